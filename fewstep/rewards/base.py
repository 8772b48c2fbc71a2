"""Everything that pushes the student is a reward."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fewstep.types import Sample, Signal


@runtime_checkable
class Reward(Protocol):
    """Says of a sample how good it is, and, if it can, which way is better."""

    def __call__(self, sample: Sample) -> Signal: ...


@runtime_checkable
class OnlineReward(Reward, Protocol):
    """A reward that learns while the student learns: the fake denoiser of R_dm, a discriminator."""

    module: nn.Module

    def loss(self, sample: Sample) -> Tensor:
        """Loss of `module` on a sample of the student's outputs (scalar)."""
        ...
