"""Pure functions over groups of samples (method, sections 4 and 5). `group` is (B,) int64, in any order."""

from __future__ import annotations

import torch
from torch import Tensor


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
