"""How much each reward may pull the student away from its teacher (docs/method.md: many rewards)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from fewstep.alarms import Persistence
from fewstep.errors import NumericalError

KEPT = ("log_weight", "integral", "kl", "lag", "b", "told")  # of an adaptive weight, by a checkpoint
START = 0.05  # lambda as its warm-up ends, unless told otherwise
UNREACHED = math.log(100)  # a weight this far below where it starts moves nothing
OUTGROWN = 0.6  # of the warm-up's KL: a budget on what matching has left so far behind holds nothing


def dual_step(log_weight: float, kl: float, budget: float, *, eta: float, cap: float) -> float:
    """Eq. (7): log lambda + eta clip(1 - KL / b, -1, 1), at most log cap. Below its budget the weight grows, above it shrinks."""
    return min(log_weight + eta * min(max(1 - kl / budget, -1.0), 1.0), math.log(cap))


def mean_rate(count: int, decay: float) -> float:
    """Step of a running mean that has seen `count` values: a plain mean at first, exponential once it has seen enough."""
    return max(1 - decay, 1 / (count + 1))


@dataclass
class Fixed:
    """lambda_k as given."""

    values: dict[str, float]

    def observe(self, score: float, lag: float | None) -> dict[str, float]:
        return {}

    def now(self) -> dict[str, float]:
        return self.values

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Adaptive:
    """lambda_k = lambda pi_k, with one dual variable lambda for one fidelity budget, eq. (7).

    For `warmup` evaluations of R_dm lambda is 0 and the KL that distribution matching alone reaches is measured; the budget b is
    `budget` times it. KL is the running mean of -score of R_dm plus the fake's held-out lag in the same unit: a fake that
    lags makes the KL look small. lambda never grows while the lag is above `lag_limit` times b.

    The running mean is 1 / (1 - decay) evaluations late, in a loop with a student that itself answers slowly: a sum of its errors alone
    swings around the budget. So lambda also leads the sum by what that delay withholds from it, eta / (1 - decay) times the error at
    hand, which makes it the sum of the errors of the evaluations themselves but for the clip. The sum ends where the weight moves nothing
    any more: what it gathered below would have to be undone before a KL that comes under its budget is answered.
    """

    shares: dict[str, float]  # pi_k, made to sum to 1
    budget: float  # multiple of the KL that the warm-up reaches
    warmup: int  # evaluations of R_dm
    eta: float = 0.1
    cap: float = 10.0
    start: float = START  # lambda before its first step and lead, which are taken as the warm-up ends
    lag_limit: float = 0.5
    decay: float = 0.95  # of the running means
    observed: int = field(default=0, init=False)  # evaluations of R_dm
    log_weight: float = field(default=0.0, init=False)
    integral: float = field(default=0.0, init=False)  # the log weight without its lead: the sum of the errors
    kl: float | None = field(default=None, init=False)
    lag: float | None = field(default=None, init=False)
    b: float | None = field(default=None, init=False)
    told: bool = field(default=False, init=False)  # of a budget out of reach
    outgrown: Persistence = field(default_factory=Persistence, init=False)  # the budget holds nothing

    def __post_init__(self) -> None:
        if not self.budget >= 1:  # NaN neither
            raise ValueError(f"budget is a multiple of the KL that distribution matching alone reaches: at least 1, got {self.budget}")
        if not self.cap > self.start:
            raise ValueError(f"cap must be above {self.start}, where the weight starts, got {self.cap}")
        total = sum(self.shares.values())
        if not self.shares or min(self.shares.values()) < 0 or total <= 0:
            raise ValueError(f"shares must be non-negative and not all zero, got {self.shares}")
        self.shares = {name: share / total for name, share in self.shares.items()}
        self.log_weight = self.integral = math.log(self.start)

    def observe(self, score: float, lag: float | None) -> dict[str, float]:
        """Take in the mean score of one evaluation of R_dm and, when there is a new one, the lag; returns what is logged.

        Raises NumericalError for what is not finite, which the running means would keep, and when the warm-up ends at a KL that is
        not positive: no multiple of it is a budget.
        """
        if not (math.isfinite(score) and (lag is None or math.isfinite(lag))):
            raise NumericalError(
                f"the KL to the teacher cannot be followed: the mean score of R_dm is {score}, its lag {lag}. Lower student.lr or fake.lr"
            )
        if lag is not None:
            self.lag = lag if self.lag is None else self.lag + 0.2 * (lag - self.lag)
        self.kl = -score if self.kl is None else self.kl + mean_rate(self.observed, self.decay) * (-score - self.kl)
        known_lag = self.lag or 0.0  # none has been measured before the second rollout
        kl = self.kl + known_lag
        self.observed += 1
        if self.observed >= self.warmup:
            if self.b is None:
                if not kl > 0:
                    raise NumericalError(
                        f"the KL measured in the {self.warmup} evaluations of weights.warmup is {kl:.3g}: no budget can be a multiple of "
                        "it; raise weights.warmup or the batch"
                    )
                self.b = self.budget * kl
            least = math.log(self.start) - UNREACHED
            integral = max(dual_step(self.integral, kl, self.b, eta=self.eta, cap=self.cap), least)
            following = dual_step(integral, kl, self.b, eta=self.eta / (1 - self.decay), cap=self.cap)
            if following < self.log_weight or known_lag <= self.lag_limit * self.b:
                self.integral, self.log_weight = integral, following
            if not self.told and self.log_weight < least:
                self.told = True
                warnings.warn(
                    f"the KL to the teacher, {kl:.3g}, stays above its budget {self.b:.3g} with next to no weight on other rewards "
                    f"({self.now_total():.1g}): they do not push any more. Raise weights.budget, or weights.warmup where the score of R_dm "
                    "still fell when it ended",
                    stacklevel=2,
                )
            if self.outgrown.observe(kl < OUTGROWN * self.b / self.budget):
                warnings.warn(
                    f"the KL to the teacher, {kl:.3g}, has fallen to {kl * self.budget / self.b:.0%} of what the budget {self.b:.3g} was "
                    "taken from when the warm-up ended, and stays there: matching still improved, and a budget so far above it holds the "
                    "other rewards back from nothing. Raise weights.warmup",
                    stacklevel=2,
                )
        logs = {"kl": kl, "weight": self.now_total()}
        return logs if self.b is None else logs | {"budget": self.b, "weight_at_cap": float(self.log_weight >= math.log(self.cap))}

    def now_total(self) -> float:
        return 0.0 if self.b is None else math.exp(self.log_weight)

    def now(self) -> dict[str, float]:
        return {name: self.now_total() * share for name, share in self.shares.items()}

    def state(self) -> dict[str, Any]:
        return {"updates": self.observed} | {key: getattr(self, key) for key in KEPT} | {"outgrown": self.outgrown.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises KeyError for what the state lacks."""
        self.observed = state["updates"]
        for key in KEPT:
            setattr(self, key, state[key])
        self.outgrown.load_state(state["outgrown"])
