"""docs/healthy.png and docs/unhealthy.png: the curves of two of the comparison's cells.

`python docs/curves.py` draws them from what docs/results/compare/cells keeps of each update.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from fewstep.report import curves

DOCS = Path(__file__).resolve().parent
CELLS = {
    "healthy.png": "gndmr-adaptive--clip-and-preference-seed101.json",
    "unhealthy.png": "gndmr--expensive-reward--evaluation-reuse-4--unweighted-seed101.json",
}


def drawn(name: str) -> Image.Image:
    """The picture of that name."""
    trace = json.loads((DOCS / "results" / "compare" / "cells" / CELLS[name]).read_text())["trace"]
    return curves.draw(curves.panels(curves.add({}, ({"update": update, **logs} for update, logs in enumerate(trace, 1)))))


if __name__ == "__main__":
    for name in CELLS:
        drawn(name).save(DOCS / name, optimize=True)
