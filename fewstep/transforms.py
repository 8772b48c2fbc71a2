"""Pure functions over groups of samples (docs/method.md: GNDM, many rewards). `group` is (B,) int64, in any order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LARGEST_ADVANTAGE = 5.0  # of an advantage where it multiplies R_dm's direction: one outlier of a large group is not to outweigh all others


def group_mean(value: Tensor, group: Tensor, *, leave_one_out: bool = False) -> Tensor:
    """Mean of `value` (B, ...) over each sample's group, one row per sample.

    leave_one_out: the mean over the *other* members. Raises ValueError when a group has only one member.
    """
    _, index = torch.unique(group, return_inverse=True)
    shape = (int(index.max()) + 1, *value.shape[1:])
    total = torch.zeros(shape, dtype=value.dtype, device=value.device).index_add_(0, index, value)
    count = torch.bincount(index).to(value).view(-1, *[1] * (value.ndim - 1))
    if not leave_one_out:
        return (total / count)[index]
    if bool((count < 2).any()):
        raise ValueError("leave_one_out needs groups of at least two samples (G = 1 has no others to take the mean over)")
    return (total[index] - value) / (count[index] - 1)


def scale_direction(direction: Tensor, magnitude: Tensor, group: Tensor, *, leave_one_out: bool = False) -> Tensor:
    """Eq. (5): d_i / mean_{j in group} n_j. Scaled, never centred: the group's mean direction is what moves it.

    direction (B, C, H, W); magnitude (B,), or (B, C) for one scale per channel. Raises ValueError when a group's
    scale is zero while its direction is not (the teacher reproduces x0 exactly: nothing was denoised).
    """
    scale = group_mean(magnitude, group, leave_one_out=leave_one_out)
    scale = scale.view(*scale.shape, *[1] * (direction.ndim - scale.ndim))
    zero = scale == 0
    if bool((zero & (direction != 0)).any()):
        raise ValueError("a group's denoising scale is zero: its noise levels are zero or its latents are degenerate")
    return direction / torch.where(zero, torch.ones_like(scale), scale)


def group_rms(direction: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Root mean square of `direction` (B, ...) over each sample's group and all elements, (B,), over `valid` (B,) rows alone.

    Squares are taken relative to the group's largest element, so that no size of direction under- or overflows. A group
    without a valid row gives 0.
    """
    flat = direction.flatten(1)
    if valid is not None:
        flat = torch.where(valid[:, None], flat, torch.zeros_like(flat))
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1
    largest = torch.zeros(groups, dtype=flat.dtype, device=flat.device).scatter_reduce_(0, index, flat.abs().amax(1), "amax")
    relative = flat / torch.where(largest == 0, torch.ones_like(largest), largest)[index, None]
    square = torch.zeros_like(largest).index_add_(0, index, relative.pow(2).mean(1))
    rows = torch.ones_like(flat[:, 0]) if valid is None else valid.to(flat)
    count = torch.zeros_like(largest).index_add_(0, index, rows).clamp(min=1)
    return (largest * (square / count).sqrt())[index]


def advantages(score: Tensor, group: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(r - mean_g) / (std_g + eps), score (B,) -> (B,); std over the group's members, not the sample estimate.

    A group with one member, or whose scores are all the same, gives exactly 0. A sample whose score is not finite has no
    advantage: it gets NaN, to be masked and counted, and mean and std are those of the others. No finite score overflows.
    """
    valid = torch.isfinite(score)
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1
    # at a scale of the group's own no square is inf; a power of two, so that it rounds nothing
    largest = torch.zeros(groups, dtype=score.dtype, device=score.device).scatter_reduce(0, index[valid], score[valid].abs(), "amax")
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    score = score / scale[index]
    low = torch.full_like(largest, float("inf")).scatter_reduce(0, index[valid], score[valid], "amin")
    # relative to the group's smallest: large scores keep their digits, and equal ones are exactly zero
    above = torch.where(valid, score - low[index], torch.zeros_like(score))
    total, count, square = (torch.zeros(groups, dtype=score.dtype, device=score.device) for _ in range(3))
    count.index_add_(0, index, valid.to(score))
    count.clamp_(min=1)
    mean = total.index_add_(0, index, above) / count
    centred = torch.where(valid, above - mean[index], torch.zeros_like(above))
    wide = (square.index_add_(0, index, centred**2) / count).sqrt() + eps / scale
    value = centred / torch.where(wide == 0, torch.ones_like(wide), wide)[index]  # eps of a large scale may underflow
    return torch.where(valid, value, torch.full_like(value, float("nan")))


def masked(value: Tensor, valid: Tensor | None) -> Tensor:
    """`value` (B, ...) with its rows that are not `valid` (B,) made zero, whatever they hold; all are without `valid`."""
    if valid is None:
        return value
    return torch.where(valid.view(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))


def unit(direction: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """d_k / rms_g(d_k) of eq. (6), (B, C, H, W), over `valid` (B,) rows alone; the others are zero, and so is a group of zeros."""
    scale = group_rms(direction, group, valid)
    scale = scale.view(-1, *[1] * (direction.ndim - 1))
    return masked(direction / torch.where(scale == 0, torch.ones_like(scale), scale), valid)


def weigh(
    anchor: Tensor,
    directions: dict[str, Tensor],
    weights: dict[str, float],
    group: Tensor,
    *,
    valid: dict[str, Tensor] | None = None,
) -> Tensor:
    """Eq. (6): anchor + sum_k lambda_k d_k / rms_g(d_k). anchor and each direction (B, C, H, W); group (B,).

    The anchor is dimensionless by (5) and is left as it is; every other direction is divided by its group's RMS, so its force
    neither depends on the reward's units nor fades as the anchor does. A direction that is zero over a group stays exactly zero.
    valid: rows (B,) of a reward that could be scored; the others take no part in the RMS and are moved by the anchor alone.
    Raises KeyError naming a direction that has no weight.
    """
    missing = sorted(set(directions) - set(weights))
    if missing:
        raise KeyError(f"no weight for {', '.join(missing)}; weights are given for {', '.join(weights) or 'none'}")
    total = anchor
    for name, direction in directions.items():
        total = total + pull(anchor, direction, weights[name], group, (valid or {}).get(name))
    return total


def project(anchor: Tensor, direction: Tensor) -> Tensor:
    """`direction` without the part that opposes `anchor`, sample by sample; unchanged where they agree or the anchor is zero.

    anchor, direction (B, C, H, W). After it no sample's inner product with the anchor is negative (up to rounding).
    """
    a = anchor.flatten(1)
    largest = a.abs().amax(1, keepdim=True)
    a = a / torch.where(largest == 0, torch.ones_like(largest), largest)  # only its direction counts
    square = (a**2).sum(1, keepdim=True)
    along = (a * direction.flatten(1)).sum(1, keepdim=True) / torch.where(square == 0, torch.ones_like(square), square)
    return direction - (along.clamp(max=0) * a).view_as(direction)


def pull(
    anchor: Tensor,
    direction: Tensor,
    weight: float,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    mode: Literal["fixed", "adaptive", "sum"] = "fixed",
    projected: bool = False,
) -> Tensor:
    """What one reward adds to the anchor, by `weights.mode`: its term of eq. (6), or in mode `sum` its weighted raw gradient.

    anchor, direction (B, C, H, W); group (B,); valid (B,): rows that the reward could score, the others are not pulled. projected:
    without what opposes the anchor, sample by sample, taken from the direction at RMS 1: what little is left of one that opposes is not
    blown up to full size.
    """
    if mode == "sum":
        return weight * masked(direction, valid)
    one = unit(direction, group, valid)
    return weight * (project(anchor, one) if projected else one)


def modulate(anchor: Tensor, advantage: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The `advantage` baseline: anchor * max(0, 1 + sum_k lambda_k clip(A_k, -5, 5)), (B, C, H, W).

    advantage: (B,) by reward; each is clipped alone, and a NaN, of a sample that one reward could not score, leaves what the others say
    of it. The factor is never negative: a bad score may silence a sample, not drive it away from the teacher.
    """
    if not advantage:
        return anchor
    pushes = [
        weights[name] * masked(value.clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE), ~value.isnan()) for name, value in advantage.items()
    ]
    factor = (1 + torch.stack(pushes).sum(0)).clamp(min=0)
    return factor.to(anchor).view(-1, *[1] * (anchor.ndim - 1)) * anchor
