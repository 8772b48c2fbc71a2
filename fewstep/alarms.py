"""Alarms: what an update logs, watched for a run that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass
class Persistence:
    """Whether something goes on nearly all the time: Page's cumulative sum test (Biometrika 41, 1954).

    The sum is the log likelihood ratio of a share of 0.95 against one of 0.6: each time it is so it rises by log(0.95 / 0.6), else it
    falls by log(0.4 / 0.05), and never below zero. Above 9 it has been found: 20 times in a row, or more with exceptions among them. What
    is so half of the time by chance takes it there in 0.5% of runs of 5000 updates, 0.4 of the time in fewer than 0.01% (simulated).
    """

    RISE, FALL, LIMIT = math.log(0.95 / 0.6), math.log(0.4 / 0.05), 9.0

    sum: float = 0.0
    since: int = 0  # times observed since the sum was last zero
    found: bool = False

    def observe(self, so: bool) -> bool:
        """Take in whether it is so now; says so, once, when it has been nearly all the time."""
        self.sum = max(0.0, self.sum + (self.RISE if so else -self.FALL))
        self.since = self.since + 1 if self.sum else 0
        first = self.sum > self.LIMIT and not self.found
        self.found |= first
        return first

    def state(self) -> dict[str, Any]:
        return {"sum": self.sum, "since": self.since, "found": self.found}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sum, self.since, self.found = state["sum"], state["since"], state["found"]


class Alarm(NamedTuple):
    of: Literal["anchor", "policy"]  # the terms it watches
    key: str  # of what they log
    wrong: Callable[[float], bool]
    says: str  # with {name}, {value} and {since}, the number of times


# what changes a setting: a run that goes on keeps its own
FROM_BEFORE = "begin a new run from a checkpoint of before (--init RUN/checkpoints/step-XXXXXXXX --output NEW)"

ALARMS = (
    # of all functions of xt the mean of q given xt has the least squared error on q's samples, at every noise level
    Alarm(
        "anchor",
        "fake_error",
        lambda ratio: ratio >= 1 - 1e-6,  # the same network as the teacher's is no better, whatever rounding says
        "the fake of {name!r} denoises the student's outputs no better than the teacher does, in nearly all of the last {since} "
        "evaluations (its squared error is now {value:.3g} of the teacher's): it does not follow the student, and what moves that is no "
        "gradient of a KL. Raise fake.updates, bring fake.lr back to the recipe's, or lower student.lr, and "
        f"{FROM_BEFORE}",
    ),
    Alarm(
        "anchor",
        "inflation",
        lambda inflation: not 0.5 <= inflation <= 1.5,
        "the student's latents are {value:.3g} times as large as what the teacher sees in them, for nearly all of the last {since} "
        "evaluations: they have left what the teacher knows, and its direction means little there. Lower student.lr or matching.guidance, "
        f"or raise fake.updates, and {FROM_BEFORE}",
    ),
    Alarm(
        "policy",
        "constant_groups",
        lambda share: share >= 0.9,
        "reward {name!r} gives all members of a group the same score in {value:.0%} of the groups, and in nearly all of the last {since} "
        "rollouts: a policy gradient learns nothing from it. Give it a finer scale, or raise group_size",
    ),
)


class Watch:
    """The alarms of a run: each of `terms`, which role ("anchor", "policy") by name, has those of its role, raised once each."""

    def __init__(self, terms: dict[str, str]):
        self.alarms = {(name, alarm.key): (alarm, Persistence()) for name, role in terms.items() for alarm in ALARMS if alarm.of == role}

    def observe(self, logs: dict[str, float]) -> list[str]:
        """Take in what an update logs; what is to be told now."""
        told = []
        for (name, key), (alarm, persistence) in self.alarms.items():
            value = logs.get(f"{name}/{key}")
            if value is not None and persistence.observe(alarm.wrong(value)):
                told.append(alarm.says.format(name=name, value=value, since=persistence.since))
        return told

    def state(self) -> dict[str, Any]:
        return {f"{name}/{key}": persistence.state() for (name, key), (_, persistence) in self.alarms.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """What an earlier run did not watch begins anew."""
        for (name, key), (_, persistence) in self.alarms.items():
            if f"{name}/{key}" in state:
                persistence.load_state(state[f"{name}/{key}"])
