"""The student as a policy over K steps (docs/method.md: the student is a policy)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.schedule import Schedule, bcast
from fewstep.types import Rollout


class Student:
    """K steps at `times` 1 = t_0 > ... > t_{K-1} > 0: predict x0, renoise to the next time, predict again.

    Each transition is Gaussian with mean alpha_{k+1} x0_k and standard deviation sigma_{k+1}; the last x0 is the sample.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule, times: Tensor | list[float]):
        self.denoiser, self.schedule = denoiser, schedule
        self.times = torch.as_tensor(times, dtype=torch.float64)
        if self.times.ndim != 1 or len(self.times) < 1 or bool((self.times.diff() >= 0).any()):
            raise ValueError(f"times must be one decreasing list, got {self.times.tolist()}")
        if not 0 < float(self.times[-1]) <= float(self.times[0]) <= 1:
            raise ValueError(f"times must lie in (0, 1], got {self.times.tolist()}")

    @property
    def steps(self) -> int:
        return len(self.times)

    def t(self, k: Tensor | int, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Time of state k for each sample, (B,) float64."""
        index = torch.as_tensor(k).cpu().expand(batch)
        return self.times[index].to(device)

    def predict(self, xk: Tensor, k: Tensor | int, cond: Any) -> Tensor:
        """x0_k = D_student(x_k, t_k). xk (B, C, H, W); k one index or (B,)."""
        return self.denoiser(xk, self.t(k, len(xk), xk.device), cond)

    def step(self, x0: Tensor, k: int, noise: Tensor) -> Tensor:
        """x_{k+1} = alpha_{k+1} x0_k + sigma_{k+1} noise. Raises ValueError after the last step, which is deterministic."""
        if not 0 <= k < self.steps - 1:
            raise ValueError(f"step {k} of {self.steps} has no next state: the last prediction is the sample")
        t = self.t(k + 1, len(x0), x0.device)
        return self.schedule.noised(x0, t, noise)

    @torch.no_grad()
    def rollout(
        self,
        noise: Tensor,
        cond: Any,
        *,
        group: Tensor | None = None,
        prompts: list[str] | None = None,
        generator: torch.Generator | None = None,
        until: int | None = None,
    ) -> Rollout:
        """All K states and predictions from `noise` (B, C, H, W), in K network calls. Noise is drawn in diffusers' order.

        until: stop after the prediction at this state (a shorter rollout of until + 1 states).
        """
        states, predictions, xk = [], [], noise
        last = self.steps - 1 if until is None else until
        for k in range(last + 1):
            states.append(xk)
            predictions.append(self.predict(xk, k, cond))
            if k < last:
                fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype, device=noise.device)
                xk = self.step(predictions[-1], k, fresh)
        group = torch.arange(len(noise), device=noise.device) if group is None else group
        return Rollout(torch.stack(states), torch.stack(predictions), self.times[: last + 1], cond, group, prompts or [])

    def transition_log_prob(self, x0: Tensor, following: Tensor, k: int) -> Tensor:
        """log N(x_{k+1}; alpha_{k+1} x0_k, sigma_{k+1}^2 I) of the transition from state k, summed over dimensions, (B,) float64.

        x0, following (B, C, H, W). Raises ValueError for the last step: it is deterministic and has no density.
        """
        if not 0 <= k < self.steps - 1:
            raise ValueError(f"step {k} of {self.steps} is deterministic: it has no log-probability")
        t = self.t(k + 1, len(x0), x0.device)
        alpha, sigma = bcast(self.schedule.alpha(t), x0), bcast(self.schedule.sigma(t), x0)
        dimensions = x0[0].numel()
        # of the sum of so many terms float32 keeps hundredths, and the difference of two such sums is the log of a ratio
        square = ((following - alpha * x0) / sigma).pow(2).flatten(1).sum(1, dtype=torch.float64)
        return -0.5 * square - dimensions * (sigma.flatten().double().log() + 0.5 * math.log(2 * math.pi))

    def log_prob_from(self, rollout: Rollout, k: int) -> Tensor:
        """Log-probability of a rollout's transition from state k under today's weights, (B,) float64, differentiable."""
        return self.transition_log_prob(self.predict(rollout.states[k], k, rollout.cond), rollout.states[k + 1], k)

    def log_prob(self, rollout: Rollout) -> Tensor:
        """Log-probability of each stochastic transition of a rollout under today's weights, (B, K-1) float64, differentiable.

        For a caller that holds the graph of all of them at once; the trainer goes transition by transition (`log_prob_from`). Raises
        ValueError for a one-step student, which has none.
        """
        if self.steps == 1:
            raise ValueError("a one-step student is deterministic: it has no transition, hence no log-probability")
        return torch.stack([self.log_prob_from(rollout, k) for k in range(self.steps - 1)], 1)
