"""The things that travel between the student, the rewards and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class Rollout(NamedTuple):
    """One pass of the K-step student over a batch, without gradient. Every state is a training state."""

    states: Tensor  # (K, B, C, H, W), x_0 .. x_{K-1}
    x0: Tensor  # (K, B, C, H, W), the student's prediction at each state
    times: Tensor  # (K,), 1 = t_0 > ... > t_{K-1} > 0
    cond: Any
    group: Tensor  # (B,) int64
    prompts: list[str]

    def rows(self, rows: slice) -> Rollout:
        """The same rollout of some of its samples."""
        cond = {key: value[rows] for key, value in self.cond.items()}
        return Rollout(self.states[:, rows], self.x0[:, rows], self.times, cond, self.group[rows], self.prompts[rows])


class Sample:
    """What a reward sees: predictions of the student at one state each.

    x0 (B, C, H, W), requiring grad when pathwise directions are wanted; t_k (B,) time of the state each was predicted from;
    cond; prompts; group (B,). k (B,) int64: that state's index, which a fake may be told; decode: latents -> pictures, for `image`.
    """

    def __init__(
        self,
        x0: Tensor,
        t_k: Tensor,
        cond: Any,
        prompts: list[str],
        group: Tensor,
        *,
        k: Tensor | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.x0, self.t_k, self.cond, self.prompts, self.group, self.k = x0, t_k, cond, prompts, group, k
        self._decode = decode

    def rows(self, rows: slice) -> Sample:
        """Some of the samples, with a picture of their own. Their x0 is a leaf where this one's is."""
        x0 = self.x0[rows].detach().requires_grad_(self.x0.requires_grad) if self.x0.is_leaf else self.x0[rows]
        cond = {key: value[rows] for key, value in self.cond.items()}
        k = None if self.k is None else self.k[rows]
        return Sample(x0, self.t_k[rows], cond, self.prompts[rows], self.group[rows], k=k, decode=self._decode)

    @cached_property
    def image(self) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded once, differentiable in x0; in float32 or more, whatever the autoencoder is in.

        Raises ValueError for a sample that was given no `decode`.
        """
        if self._decode is None:
            raise ValueError("this sample has no picture: give Sample its `decode`, a function of latents")
        decoded = self._decode(self.x0)  # of a scorer, bf16 would hide the differences inside a group, and NumPy has none
        return decoded.to(torch.promote_types(decoded.dtype, torch.float32))


class Moments(NamedTuple):
    """Mean squares over a sample's latents, (B,) each, where R_dm was evaluated."""

    x0: Tensor  # of the student's prediction
    guided: Tensor  # of the teacher's, under guidance
    teacher_error: Tensor  # of x0 - D_teacher(xt), without guidance
    fake_error: Tensor  # of x0 - D_fake(xt)


class Signal(NamedTuple):
    """What a reward says of a sample. xt and t: where the direction was evaluated, when eq. (8) can carry it to a moved student;
    magnitude: of R_dm's direction, what its scale is the mean of; moments: what tells whether it can be trusted."""

    score: Tensor | None  # (B,), higher is better; NaN = could not be scored
    direction: Tensor | None  # (B, C, H, W), ascent direction in latent space
    xt: Tensor | None = None  # (B, C, H, W)
    t: Tensor | None = None  # (B,)
    magnitude: Tensor | None = None  # (B,), n_i = mean |x0_i - D_teacher(xt_i)|
    moments: Moments | None = None


class Evaluation(NamedTuple):
    """One evaluation of R_dm at the renoised latents xt = alpha x0 + sigma noise."""

    xt: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    direction: Tensor  # (B, C, H, W), scaled by eq. (5)
    score: Tensor  # (B,), one draw of eq. (4)
    magnitude: Tensor  # (B,), n_i = mean |x0_i - D_teacher(xt_i)|
    moments: Moments


@dataclass
class Term:
    """A reward as the trainer holds it; an online one brings the parameters it trains and their optimizer's settings.

    The anchor's direction is followed as it is (R_dm, dimensionless by eq. (5)); every other term joins it by its weight.
    """

    reward: Callable[[Sample], Signal]  # rewards.base.Reward
    parameters: dict[str, nn.Parameter] | None = None
    lr: float = 0.0
    decay: float = 0.0  # share of the run, at its end, over which lr falls to zero
    betas: tuple[float, float] = (0.9, 0.99)
    updates: int = 1  # per student update
    on: Literal["all", "last"] = "all"  # which of the student's predictions it learns: those of all steps, or the finished samples
    max_norm: float = 1.0
    anchor: bool = False
    via: Literal["pathwise", "policy"] = "pathwise"
