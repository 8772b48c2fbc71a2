"""The embedded world: a tiny real teacher, its scorers and reference data, shipped with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
TEACHER = ASSETS / "teacher"
SAMPLES = ASSETS / "samples"  # what evaluation sees of the teacher's own pictures
IMAGES_PER_PROMPT = 8  # of an evaluation, unless told otherwise
TEACHER_GUIDANCE = 3.0
VARIANTS = 8  # jittered copies of each picture in the reference features; the first is the picture itself
TWINS = {"clip": ASSETS / "clip-heldout", "preference": Path(__file__).parent / "utility.py"}  # what each reward's `held_out` judge is
NEIGHBOURS = 3 * VARIANTS  # k of precision and recall: a copy's nearest neighbours are the other copies of its picture


def source(teacher: str) -> str:
    """Folder or hub id of a teacher; `world` is the embedded one."""
    return str(TEACHER) if teacher == "world" else teacher


def prompts(split: str) -> list[str]:
    """`train` to distil with, `evaluate` to measure with (captions of held-out pictures), `grid` to look at."""
    return json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))[split]


def latents() -> Any:
    """(N, C, H, W) of the drawn pictures that are not held out, in float16: what a discriminator may see."""
    from safetensors.torch import load_file

    held = load_file(ASSETS / "latents.safetensors")
    return held["latents"][~held["heldout"]]


def load_scorers(assets: Path = ASSETS, *, device: str = "cpu") -> dict[str, Any]:
    """The world's CLIPScores and PickScore by name, those that judge among them."""
    from fewstep.rewards.clip import CLIPScore, PickScore

    kinds = {"clip": CLIPScore, "clip-heldout": CLIPScore, "preference": PickScore}
    return {name: kind.load(assets / name, device=device) for name, kind in kinds.items()}


def held_out(name: str, *, device: str = "cpu") -> Any:
    """The judge that stands beside a reward of the world and is no part of any training: a function of (images, prompts) -> (B,).

    clip: another CLIP, trained on its own; preference: the gold utility, whose noisy choices the preference was trained on.
    Raises ValueError for any other name.
    """
    if name == "clip":
        return load_scorers(device=device)["clip-heldout"].score
    if name == "preference":
        return gold
    raise ValueError(f"the embedded world has held-out twins of clip and preference, not of {name!r}")


def gold(images: Any, prompts: list[str]) -> Any:
    """The gold utility of pictures (B, 3, H, W), (B,), as rewards are called: it does not read their prompts."""
    from fewstep.world.utility import gold_utility

    return gold_utility(images)
