"""The README says what the committed results say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_tables_are_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    tables = runpy.run_path(str(ROOT / "docs" / "readme_table.py"))
    assert tables["written"](readme) == readme


def test_the_page_on_evaluation_knows_every_flag_set_and_extractor(capsys):
    import pytest

    from fewstep import cli
    from fewstep.evaluate import features, protocol, sets

    page = (ROOT / "docs" / "evaluation.md").read_text()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    flags = {word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")}
    told = {"--seed", "--guidance", "--batch", "--precision", "--images-per-prompt"}  # the help says all there is to say
    assert not {flag for flag in flags - told if flag not in page and not flag.startswith(("--help", "--extractor.NAME"))}
    assert all(
        f"`{name}` | {f'{known.count:,}'.replace(',', ' ') if known.count > 9999 else known.count}" in page
        for name, known in sets.SETS.items()
    )
    assert all(f"--extractor.{name}" in page for name in features.EXTRACTORS)
    assert all(name in page for name in protocol.SOLVERS)
