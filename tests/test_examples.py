"""The examples run and find what they claim."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_gaussians(tmp_path, monkeypatch, capsys):
    """As a script, in this process: it imports what the other tests have imported already."""
    monkeypatch.setattr(sys, "argv", ["gaussians.py", "--quick", "--output", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "gaussians.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
