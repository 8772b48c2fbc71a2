"""The embedded world: a tiny real teacher, its scorers and reference data, shipped with the package."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEACHER = ASSETS / "teacher"
TEACHER_STEPS = 28
TEACHER_GUIDANCE = 3.0


def prompts(split: str) -> list[str]:
    """`train` to distil with, `evaluate` to measure with (captions of held-out pictures), `grid` to look at."""
    return json.loads((ASSETS / "prompts.json").read_text())[split]
