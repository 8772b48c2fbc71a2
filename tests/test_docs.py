"""The README says what the committed results say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_table_is_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    numbers = runpy.run_path(str(ROOT / "docs" / "readme_table.py"))
    assert numbers["BEGIN"] in readme
    assert numbers["written"](readme) == readme
