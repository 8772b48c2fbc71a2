"""The losses: a direction carried to the student, the clipped policy gradient, and the fake's denoising loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.schedule import bcast


def pathwise(x0: Tensor, direction: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all elements of weight * 0.5 (x0 - sg(x0 + direction))^2 (docs/method.md: R_dm).

    Its gradient in x0 is exactly -weight * direction / numel: descending the loss moves x0 along +direction.
    x0, direction (B, C, H, W); weight (B,) or None.
    """
    # x0 - sg(x0) is exactly zero, so no rounding of x0 + direction reaches the gradient; the direction is stopped because
    # it is a reward's gradient, not a function to differentiate again
    residual = (x0 - x0.detach()) - direction.detach()
    loss = 0.5 * residual**2
    return (loss if weight is None else bcast(weight.detach(), loss) * loss).mean()


def denoising(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in the network's own parametrisation, (B, ...) -> scalar."""
    return ((prediction - target.detach()) ** 2).mean()


def policy(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Clipped policy gradient, - mean of min(rho A, clamp(rho, 1 - clip, 1 + clip) A) (Schulman et al., arXiv 1707.06347).

    log_prob, old_log_prob (B, K-1), each summed over dimensions; rho is their ratio transition by transition, and the sample's
    advantage (B,) belongs to each of its transitions. Samples without an advantage (NaN) are left out of the mean; a batch
    with none left gives 0. A log-probability that is NaN makes the loss NaN. Raises ValueError for shapes that do not belong together,
    for a one-step student's, which has no transition, and for a clip that is not positive.
    """
    if log_prob.ndim != 2 or log_prob.shape != old_log_prob.shape or advantage.shape != log_prob.shape[:1]:
        raise ValueError(
            f"log_prob and old_log_prob must be (B, K-1) and advantage (B,), got {tuple(log_prob.shape)}, "
            f"{tuple(old_log_prob.shape)} and {tuple(advantage.shape)}"
        )
    if log_prob.shape[1] == 0:
        raise ValueError("a one-step student is deterministic: it has no transition, hence no policy gradient")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    known = ~torch.isnan(advantage)
    if not bool(known.any()):
        return 0 * log_prob.sum()
    log_ratio = log_prob[known] - old_log_prob[known].detach()  # the old policy made the samples: it is not what is trained
    a = advantage[known].detach()[:, None].to(log_prob)
    inside = inside_clip(log_ratio, a, clip)
    # outside, the gradient is zero and the ratio may overflow: exp is taken only where it counts
    ratio = torch.where(inside, log_ratio, torch.zeros_like(log_ratio)).exp()
    bound = torch.where(a > 0, 1 + clip, 1 - clip)
    return -(torch.where(inside, ratio, bound.to(ratio)) * a).mean()


def inside_clip(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Where the clipped policy gradient still moves: the ratio has not yet gone past its bound in the direction the advantage asks for."""
    ratio = log_ratio.detach().exp()
    # asked the other way round, a ratio that is NaN would be held back, and the loss hide it
    return ~torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)


def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: float) -> float:
    """Share of the transitions with an advantage that `policy` holds back, in [0, 1]."""
    known = ~torch.isnan(advantage)
    if not bool(known.any()):
        return 0.0
    log_ratio = (log_prob - old_log_prob).detach()[known]
    return float((~inside_clip(log_ratio, advantage[known][:, None], clip)).double().mean())
