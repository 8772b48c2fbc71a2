"""The embedded world: a tiny real teacher, its scorers and reference data, shipped with the package."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEACHER = ASSETS / "teacher"
TEACHER_STEPS = 28
TEACHER_GUIDANCE = 3.0
VARIANTS = 8  # jittered copies of each picture in the reference features; the first is the picture itself
NEIGHBOURS = 3 * VARIANTS  # k of precision and recall: a copy's nearest neighbours are the other copies of its picture


def prompts(split: str) -> list[str]:
    """`train` to distil with, `evaluate` to measure with (captions of held-out pictures), `grid` to look at."""
    return json.loads((ASSETS / "prompts.json").read_text())[split]
