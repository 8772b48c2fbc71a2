"""The things that travel between the student, the rewards and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    k (B,) int64 its index; cond; prompts; group (B,).
    """

    def __init__(
        self, x0: Tensor, t_k: Tensor, k: Tensor, cond: Any, prompts: list[str], group: Tensor, decode: Callable[[Tensor], Tensor]
    ):
        self.x0, self.t_k, self.k, self.cond, self.prompts, self.group = x0, t_k, k, cond, prompts, group
        self._decode = decode

    def rows(self, rows: slice) -> Sample:
        """Some of the samples, with a picture of their own. Their x0 is a leaf where this one's is."""
        x0 = self.x0[rows].detach().requires_grad_(self.x0.requires_grad) if self.x0.is_leaf else self.x0[rows]
        cond = {key: value[rows] for key, value in self.cond.items()}
        return Sample(x0, self.t_k[rows], self.k[rows], cond, self.prompts[rows], self.group[rows], self._decode)

    @cached_property
    def image(self) -> Tensor:
        """(B, 3, H, W) in [0, 1], decoded once, differentiable in x0; in float32 or more, whatever the autoencoder is in."""
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
