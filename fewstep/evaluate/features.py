"""Features of pictures. A distance is named after its features: FD-clip, never FID (that is InceptionV3's)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor

from fewstep.rewards.clip import CLIPScore


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 64, progress: str | None = None) -> Tensor:
    """`function` over images (N, 3, H, W), `batch` at a time -> (N, ...) on the CPU. progress: the bar's name (None: no bar)."""
    chunks = images.split(batch)
    return torch.cat([function(chunk).cpu() for chunk in track(chunks, progress or "", disable=progress is None)])


def scaled(unit: Tensor) -> Tensor:
    """FD-clip features from unit image features (N, d): times sqrt(d), so that the mean square per dimension is 1."""
    return unit * unit.shape[1] ** 0.5


def clip_features(scorer: CLIPScore, images: Tensor, *, batch: int = 64, progress: str | None = None) -> Tensor:
    """FD-clip features of images (N, 3, H, W) in [0, 1] -> (N, d) on the CPU.

    The scorer's unit image features times sqrt(d): the mean square per dimension is 1 whatever d, and every distance of
    the features is d times that of the unit features.
    """
    return scaled(in_batches(scorer.image_features, images, batch=batch, progress=progress))
