"""How much guidance R_dm needs at each noise level (method, "Guidance inside R_dm")."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser
from fewstep.schedule import Schedule, bcast

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


class Curve:
    """A guidance scale for each time, linear between (times, values), constant beyond them. Called with t (B,) -> (B,)."""

    def __init__(self, times: list[float], values: list[float]):
        if len(times) != len(values) or not times or any(b <= a for a, b in pairwise(times)):
            raise ValueError(f"a curve needs as many values as increasing times, got {times} and {values}")
        self.times, self.values = list(times), list(values)

    def __call__(self, t: Tensor) -> Tensor:
        times, values = (torch.tensor(x, dtype=torch.float64, device=t.device) for x in (self.times, self.values))
        if len(times) == 1:
            return values.expand(len(t)).to(t)
        place = t.double().clamp(times[0], times[-1])
        right = torch.searchsorted(times, place).clamp(1, len(times) - 1)
        share = (place - times[right - 1]) / (times[right] - times[right - 1])
        return torch.lerp(values[right - 1], values[right], share).to(t)


@torch.no_grad()
def calibrate(
    teacher: Denoiser, schedule: Schedule, x0: Tensor, cond: Cond, *, generator: torch.Generator | None = None, batch: int = 64
) -> Curve:
    """The scale w at each of LEVELS at which the guided teacher is the best denoiser of x0, its own guided samples.

    R_dm compares diffused densities. That of the samples a guided teacher draws has the denoiser E[x0 | xt], and among
    D_u + w (D_c - D_u) the least squared error is at

        w(t) = < x0 - D_u, D_c - D_u > / | D_c - D_u |^2 ,

    sums over samples and dimensions. A sampler's own scale is no density's at any level but on the sampler's path: at high noise it
    overshoots, and a student that follows it there over-saturates.

    x0 (N, C, H, W), cond with N rows. Raises ValueError when the condition changes nothing at some level.
    """
    values = []
    for level in LEVELS:
        t = torch.full((len(x0),), level, dtype=torch.float64, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0)
        xt = bcast(schedule.alpha(t), x0) * x0 + bcast(schedule.sigma(t), x0) * noise
        along = square = 0.0
        for rows in torch.arange(len(x0)).split(batch):
            part = {key: value[rows] for key, value in cond.items()}
            conditional, unconditional = teacher.pair(xt[rows], t[rows], part)
            change = (conditional - unconditional).double()
            along += float(((x0[rows] - unconditional) * change).sum())
            square += float(change.square().sum())
        if not square > 0:
            raise ValueError(f"the teacher's prediction does not depend on the prompt at t = {level}: there is nothing to calibrate")
        values.append(along / square)
    return Curve(list(LEVELS), values)
