"""Held-out judges: they score what a reward is trained on and are never trained on themselves, and tell when the two part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
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

    blocks: list[tuple[float, float]] = field(default_factory=list)  # means of (reward, judge): those of the last two windows
    running: list[tuple[float, float]] = field(default_factory=list)  # of the block that is not full yet
    count: int = 0  # of all blocks there were
    moved: tuple[float, float] = (0.0, 0.0)  # sums of the squared differences of neighbouring blocks
    best: tuple[int, float, float] | None = None  # block at its end and means of the earlier window in which the judge was highest
    parted: bool = False

    def observe(self, trained: float, judged: float) -> Parted | None:
        """Take in one evaluation's mean scores; says so, once, when the two have parted: then they are watched no longer."""
        if self.parted:
            return None
        self.running.append((trained, judged))
        if len(self.running) < self.BLOCK:
            return None
        self.take(mean(self.running))
        self.running = []
        found = self.compare()
        self.parted = found is not None
        return found

    def take(self, block: tuple[float, float]) -> None:
        """Take in one block; every number is kept that `compare` needs, and no history."""
        if self.blocks:
            before = self.blocks[-1]
            self.moved = (self.moved[0] + square(block[0] - before[0]), self.moved[1] + square(block[1] - before[1]))
        self.blocks = [*self.blocks, block][-2 * self.WINDOW :]
        self.count += 1
        if len(self.blocks) == 2 * self.WINDOW:
            trained, judged = mean(self.blocks[: self.WINDOW])  # the newest window that has nothing in common with the last one
            if self.best is None or judged > self.best[2]:
                self.best = (self.count - self.WINDOW, trained, judged)

    def compare(self) -> Parted | None:
        """The newest window and the best earlier one, or None while they have not parted."""
        if self.best is None:
            return None
        end, *then = self.best
        now = mean(self.blocks[-self.WINDOW :])
        # of a difference of two windows, from the variance of one block
        trained, judged = (self.ERRORS * math.sqrt(moved / (2 * (self.count - 1)) * 2 / self.WINDOW) for moved in self.moved)
        if not (now[0] - then[0] > trained and then[1] - now[1] > judged):
            return None
        return Parted(end * self.BLOCK, (then[0], now[0]), (then[1], now[1]))

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises KeyError for what the state lacks."""
        self.blocks, self.running = ([(float(a), float(b)) for a, b in state[key]] for key in ("blocks", "running"))
        self.parted, self.count, self.moved = state["parted"], state["count"], tuple(state["moved"])
        self.best = tuple(state["best"]) if state["best"] else None


def mean(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)


def square(value: float) -> float:
    return value * value  # `**` raises where it overflows
