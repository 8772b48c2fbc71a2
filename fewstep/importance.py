"""Importance weights for an evaluation of R_dm made before the student moved (docs/method.md: reuse).

The renoising xt ~ N(alpha x0, sigma^2 I) is a Gaussian policy of the student: moved from x0_old to x0_new, the same xt has
another density, and the ratio of the two is what an old evaluation must be weighted with.
"""

from __future__ import annotations

import math

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


def move(x0_old: Tensor, x0_new: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = |alpha (x0_new - x0_old)|^2 / sigma^2, (B,): the log ratio (8) of xt drawn at x0_old is N(-v / 2, v), so E[rho^2] = exp(v)."""
    return (alpha / sigma).double() ** 2 * (x0_new - x0_old).double().pow(2).flatten(1).sum(1)


def expected_sample_size(move: Tensor) -> float:
    """What `effective_sample_size` of untruncated weights tends to, given the moves v (B,): E[rho]^2 / E[rho^2] = 1 / mean exp(v).

    Unlike the size of a drawn sample it does not overestimate where a few large weights were not drawn.
    """
    return float(1 / move.double().exp().mean())


def permitted_updates(move: Tensor, *, min_ess: float) -> float:
    """How many updates one evaluation may serve before the expected sample size falls under `min_ess`, in [1, inf].

    move (B,): v after *one* update; a drift grows it with the square of the number of updates. Where all v are equal this is
    1 + sqrt(log(1 / min_ess) / v).
    """
    if not float(move.max()) > 0:
        return float("inf")
    # 1 / mean exp(s^2 v) = min_ess lies between the s at which the largest v alone and the mean v alone would reach it
    bound = -math.log(min_ess)
    low, high = (bound / float(move.max())) ** 0.5, (bound / float(move.mean())) ** 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_sample_size(middle**2 * move) >= min_ess else (low, middle)
    return 1 + low
