"""Importance weights for an evaluation of R_dm made before the student moved (method, section 6).

The renoising xt ~ N(alpha x0, sigma^2 I) is a Gaussian policy of the student: moved from x0_old to x0_new, the same xt has
another density, and the ratio of the two is what an old evaluation must be weighted with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.schedule import bcast


def log_ratio(xt: Tensor, x0_old: Tensor, x0_new: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Eq. (8): log N(xt; alpha x0_new, sigma^2) - log N(xt; alpha x0_old, sigma^2), summed over dimensions, (B,).

    xt, x0_old, x0_new (B, C, H, W); alpha, sigma (B,). The difference of the two squares is factored, so that equal x0
    give exactly 0. Raises ValueError where sigma = 0: a density needs noise.
    """
    if bool((sigma == 0).any()):
        raise ValueError("an importance ratio needs noise: sigma = 0 is no density")
    a = bcast(alpha, xt)
    product = (x0_new - x0_old) * (xt - a * (x0_old + x0_new) / 2)
    return (alpha / sigma**2).to(product) * product.flatten(1).sum(1)


def weights(log_ratio: Tensor, *, rho_max: float) -> Tensor:
    """min(rho, rho_max), (B,) -> (B,): truncated, not self-normalised (Ionides 2008), so that E[rho] = 1 stays true below it."""
    if not rho_max >= 1:
        raise ValueError(f"rho_max must be at least 1 (a ratio of 1 is no move at all), got {rho_max}")
    return log_ratio.exp().clamp(max=rho_max)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) of the *untruncated* weights (B,), a scalar in (0, 1]; NaN when every weight is zero or one is not finite."""
    w = weights / weights.max()  # the size is free of scale, and squares of large weights overflow
    return w.sum() ** 2 / (len(w) * (w**2).sum())


def permitted_updates(log_ratio: Tensor, *, min_ess: float) -> float:
    """How many updates one evaluation may serve before the expected effective sample size exp(-v) falls under `min_ess`.

    log_ratio (B,): after *one* update. v = |alpha delta|^2 / sigma^2 is estimated by E[log_ratio^2], of which v^2 / 4 + v is the
    value (log_ratio ~ N(-v/2, v)); a drift grows v with the square of the number of updates.
    """
    second = float((log_ratio.double() ** 2).mean())
    v = 2 * (-1 + (1 + second) ** 0.5)
    if v == 0:
        return float("inf")
    return 1 + (-torch.log(torch.tensor(min_ess, dtype=torch.float64)).item() / v) ** 0.5
