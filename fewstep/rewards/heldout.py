"""Held-out judges: they score what a reward is trained on and are never trained on themselves, and tell when the two part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fewstep.rewards.base import PixelReward
from fewstep.types import Sample, Signal


class HeldOut(PixelReward):
    """A function of (images, prompts) that scores and gives no direction, whatever the sample asks for."""

    def __call__(self, sample: Sample) -> Signal:
        with torch.no_grad(), torch.autocast(sample.x0.device.type, enabled=False):
            return Signal(self.score(sample), None)


class Parted(NamedTuple):
    """What a reward and its judge gave where the judge was at its best, and what they give now: means over a window."""

    evaluation: int  # the last one of the window in which the judge was at its best
    trained: tuple[float, float]  # then, now
    judged: tuple[float, float]


@dataclass
class Parting:
    """Whether the reward that is trained on still rises while its held-out judge has begun to fall: the reward is over-optimised
    (Gao, Schulman and Hilton, arXiv 2210.10760).

    Scores are averaged in blocks of `BLOCK` evaluations; a window is `WINDOW` blocks. The newest window is compared with the earlier one
    in which the judge was highest: both changes must exceed `ERRORS` standard errors of a difference of two windows. The noise of a
    block is taken from the differences of neighbouring blocks, which a slow trend hardly touches. Five, since the best of many windows
    is some errors above the mean by chance: of 400 runs without parting, of 400 evaluations each, none raised it (tests/test_heldout.py).
    """

    BLOCK, WINDOW, ERRORS = 5, 8, 5.0

    blocks: list[tuple[float, float]] = field(default_factory=list)  # means of (reward, judge)
    running: list[tuple[float, float]] = field(default_factory=list)  # of the block that is not full yet
    parted: bool = False

    def observe(self, trained: float, judged: float) -> Parted | None:
        """Take in one evaluation's mean scores; says so, once, when the two have parted."""
        self.running.append((trained, judged))
        if len(self.running) < self.BLOCK:
            return None
        self.blocks.append((sum(a for a, _ in self.running) / self.BLOCK, sum(b for _, b in self.running) / self.BLOCK))
        self.running = []
        found = None if self.parted else parting(torch.tensor(self.blocks, dtype=torch.float64), self.WINDOW, self.ERRORS)
        if found is None:
            return None
        self.parted = True
        return found._replace(evaluation=found.evaluation * self.BLOCK)

    def state(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "running": self.running, "parted": self.parted}

    def load_state(self, state: dict[str, Any]) -> None:
        self.blocks, self.running = ([(float(a), float(b)) for a, b in state[key]] for key in ("blocks", "running"))
        self.parted = state["parted"]


def parting(blocks: torch.Tensor, window: int, errors: float) -> Parted | None:
    """The two columns of `blocks` (n, 2), means of (reward, judge), compared as `Parting` says; evaluation counts blocks here."""
    if len(blocks) < 2 * window:
        return None
    means = blocks.unfold(0, window, 1).mean(-1)  # (n - window + 1, 2)
    now, before = means[-1], means[:-window]
    best = int(before[:, 1].argmax())
    then = before[best]
    noise = (blocks.diff(dim=0).square().mean(0) / 2).sqrt()  # of one block
    rise = (now - then) * torch.tensor([1.0, -1.0], dtype=blocks.dtype)  # the judge's is a fall
    if not bool((rise > errors * noise * (2 / window) ** 0.5).all()):
        return None
    return Parted(best + window, (float(then[0]), float(now[0])), (float(then[1]), float(now[1])))
