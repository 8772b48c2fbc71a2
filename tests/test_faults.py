"""The campaign of faults in short, and the table that its whole run left."""

import random

import pytest
from faults import DOCS, FAULTS, TEXT, as_markdown


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_what_is_promised_of_a_fault_holds(fault, tmp_path):
    assert list(fault.inject(4, random.Random(f"another than the table's {fault.what}"), tmp_path)) == [True] * 4


def test_the_table_is_of_these_faults_and_all_were_survived():
    assert DOCS.read_text() == TEXT.format(table=as_markdown([(fault, fault.trials, fault.trials) for fault in FAULTS]))
    total = sum(fault.trials for fault in FAULTS)
    assert len(FAULTS) == 11 and f"{total} faults of eleven kinds" in (DOCS.parents[1] / "README.md").read_text()
