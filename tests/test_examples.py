"""The examples run and find what they claim."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_gaussians(tmp_path):
    command = [sys.executable, str(EXAMPLES / "gaussians.py"), "--quick", "--output", str(tmp_path / "picture.png")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
