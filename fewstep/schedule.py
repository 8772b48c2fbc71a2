"""Noise schedules: xt = alpha(t) x0 + sigma(t) eps for t in [0, 1], t = 1 pure noise (docs/method.md: Setting)."""

from __future__ import annotations

import torch
from torch import Tensor


class Schedule:
    """What both kinds of schedule share; `alpha`, `sigma` and the native timesteps are theirs to define."""

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def timestep_of(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def t_of(self, timestep: Tensor) -> Tensor:
        raise NotImplementedError

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) noise. x0, noise (B, ...); t (B,)."""
        return bcast(self.alpha(t), x0) * x0 + bcast(self.sigma(t), x0) * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, (B,) -> (B,)."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def snr_decay(self, t: Tensor) -> Tensor:
        """-1/2 dSNR/dt > 0: the weight that turns squared errors into nats, eq. (4)."""
        raise NotImplementedError


class Flow(Schedule):
    """Rectified flow: alpha = 1 - t, sigma = t; native timesteps are 1000 t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def timestep_of(self, t: Tensor) -> Tensor:
        return t * 1000

    def t_of(self, timestep: Tensor) -> Tensor:
        return timestep / 1000

    def snr_decay(self, t: Tensor) -> Tensor:
        return (1 - t) / t**3


class DDPM(Schedule):
    """A discrete variance-preserving schedule: alpha = sqrt(abar), sigma = sqrt(1 - abar).

    Native timestep i in 0 .. T-1 sits at t = (i + 1) / T, so that t = 1 is the noisiest and t = 0 is clean (abar = 1).
    Between native timesteps abar is interpolated linearly.

    alphas_cumprod: (T,), decreasing, in [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor):
        abar = alphas_cumprod.detach().double().cpu()
        if abar.ndim != 1 or not bool(((abar >= 0) & (abar <= 1)).all()) or not bool((abar.diff() < 0).all()):
            raise ValueError("alphas_cumprod must be one decreasing list of numbers in [0, 1]")
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), abar])  # index i + 1 holds timestep i

    def _abar(self, t: Tensor) -> Tensor:
        place = (self.timestep_of(t).double() + 1).clamp(0, len(self.abar) - 1)
        low = place.floor().long().clamp(max=len(self.abar) - 2)
        abar = self.abar.to(t.device)
        return abar[low] + (place - low) * (abar[low + 1] - abar[low])

    def alpha(self, t: Tensor) -> Tensor:
        return self._abar(t).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._abar(t)).sqrt().to(t.dtype)

    def timestep_of(self, t: Tensor) -> Tensor:
        """Native timestep, snapped to the integer it is meant to be when float rounding alone separates them."""
        step = t * (len(self.abar) - 1) - 1
        nearest = step.round()
        return torch.where((step - nearest).abs() < 1e-3, nearest, step)

    def t_of(self, timestep: Tensor) -> Tensor:
        return (timestep + 1) / (len(self.abar) - 1)

    def snr_decay(self, t: Tensor) -> Tensor:
        """Central difference over one native timestep (one-sided at the ends of the list)."""
        half = 0.5 / (len(self.abar) - 1)
        low, high = (t.double() - half).clamp(min=half), (t.double() + half).clamp(max=1)
        return (0.5 * (self.snr(low) - self.snr(high)) / (high - low)).to(t.dtype)


def bcast(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype and on the device of `like`."""
    return value.to(like).view(-1, *[1] * (like.ndim - 1))
