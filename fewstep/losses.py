"""The two losses: a direction carried to the student, and the fake's denoising loss."""

from __future__ import annotations

from torch import Tensor

from fewstep.schedule import bcast


def pathwise(x0: Tensor, direction: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all elements of weight * 0.5 (x0 - sg(x0 + direction))^2 (method, section 3).

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
