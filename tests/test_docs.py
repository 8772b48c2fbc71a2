"""The README says what the committed results say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_tables_are_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    tables = runpy.run_path(str(ROOT / "docs" / "readme_table.py"))
    assert tables["written"](readme) == readme
