"""Any network, whatever it predicts, read as a denoiser D(xt, t) = E[x0 | xt] (docs/method.md: Setting)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.cost import in_passes
from fewstep.ranks import Ranks
from fewstep.schedule import Schedule, bcast

Prediction = Literal["epsilon", "v_prediction", "flow", "sample"]


def to_x0(prediction: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """The x0 that a prediction stands for. prediction, xt (B, ...); alpha, sigma (B,).

    Raises ValueError for an eps-prediction where alpha = 0: pure noise says nothing of x0.
    """
    a, s = bcast(alpha, xt), bcast(sigma, xt)
    if kind == "sample":
        return prediction
    if kind == "v_prediction":  # v = alpha eps - sigma x0, alpha^2 + sigma^2 = 1
        return a * xt - s * prediction
    if kind == "flow":  # u = eps - x0, alpha + sigma = 1: xt - sigma u = x0
        return xt - s * prediction
    if kind == "epsilon":
        if bool((alpha == 0).any()):
            raise ValueError("an eps-prediction has no x0 at alpha = 0 (zero terminal SNR): use v-prediction there")
        return (xt - s * prediction) / a
    raise ValueError(f"unknown prediction {kind!r}: use epsilon, v_prediction, flow or sample")


def target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """What a network of this kind is trained to say at xt = alpha x0 + sigma eps. x0, eps (B, ...); alpha, sigma (B,)."""
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return bcast(alpha, x0) * eps - bcast(sigma, x0) * x0
    if kind == "flow":
        return eps - x0
    if kind == "epsilon":
        return eps
    raise ValueError(f"unknown prediction {kind!r}: use epsilon, v_prediction, flow or sample")


def score(x0: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """grad log p_t(xt) = (alpha E[x0 | xt] - xt) / sigma^2 (Tweedie). Raises ValueError where sigma = 0.

    Eq. (1) has it cancel out of the product's own arithmetic: it is here for tests, which hold it to closed forms.
    """
    if bool((sigma == 0).any()):
        raise ValueError("a score needs noise: sigma = 0 is the data itself")
    return (bcast(alpha, xt) * x0 - xt) / bcast(sigma, xt) ** 2


def guide(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance D_u + w (D_c - D_u) (Ho and Salimans, arXiv 2207.12598); w one scale, or (B,) one for each sample."""
    w = bcast(guidance, conditional) if isinstance(guidance, Tensor) else guidance
    return unconditional + w * (conditional - unconditional)


def widened(value: Tensor) -> Tensor:
    """A network's output, which may be in half precision, in float32 or more."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


Cond = dict[str, Tensor]
SCALE = ("guidance", "timestep_cond")  # the conditions that tell a network its guidance scale: the scale itself, and what embeds it


def repeat(cond: Cond, n: int) -> Cond:
    """The condition of one sample, n times."""
    return {key: value.expand(n, *value.shape[1:]) for key, value in cond.items()}


def join(conds: list[Cond]) -> Cond:
    """Conditions below one another. Where their lengths (dimension 1: text tokens) differ, the shorter are filled with zeros; a family
    whose prompts differ in length has a mask among its conditions, in which zero means filled."""

    def fill(value: Tensor, length: int) -> Tensor:
        return torch.cat([value, value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])], 1)

    def stack(values: list[Tensor]) -> Tensor:
        if values[0].ndim == 1 or len({value.shape[1] for value in values}) == 1:
            return torch.cat(values)
        length = max(value.shape[1] for value in values)
        return torch.cat([fill(value, length) for value in values])

    return {key: stack([cond[key] for cond in conds]) for key in conds[0]}


class Denoiser(nn.Module):
    """`network(xt, timestep, cond) -> prediction`, read as x0.

    network: called with xt (B, C, H, W), its native timestep (B,) and cond, a dict of tensors with B rows.
    uncond: the condition of the empty prompt, one row; needed for guidance other than 1.
    negative: that of the prompt that guidance leads away from, one row; None: the empty one.
    `micro_batch`: samples that pass through the network together (0: all); of a larger batch one part after the other does.
    `ranks`: the processes that share a pass without gradient, each holding the whole batch before it and after it; None: no other has it.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        schedule: Schedule,
        prediction: Prediction,
        *,
        uncond: Cond | None = None,
        negative: Cond | None = None,
    ):
        super().__init__()
        self.network = network
        self.schedule, self.prediction, self.uncond, self.negative = schedule, prediction, uncond, negative
        self.micro_batch = 0
        self.ranks: Ranks | None = None
        self.forwards, self.backwards = 0, 0  # network evaluations so far, in samples

    @property
    def cost(self) -> int:
        """Network evaluations in forward passes of one sample."""
        return in_passes(self.forwards, self.backwards)

    def counted(self, output: Tensor) -> Tensor:
        """`output`, counted as a forward pass now and as a backward one when a gradient comes back through it: a graph that is
        dropped costs none."""
        samples = len(output)
        self.forwards += samples

        def came_back(gradient: Tensor) -> None:
            self.backwards += samples

        if output.requires_grad:
            output.register_hook(came_back)
        return output

    def predict(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The network's own prediction, in its own parametrisation. t (B,) in [0, 1]."""
        timestep = self.schedule.timestep_of(t)
        if self.ranks is None or torch.is_grad_enabled():
            return self.pass_through(xt, timestep, cond)
        own = self.ranks.rows(len(xt))
        return self.ranks.all_gather(self.pass_through(xt[own], timestep[own], {key: value[own] for key, value in cond.items()}))

    def pass_through(self, xt: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        """The network's output (B, C, H, W), part by part where the batch is larger than `micro_batch`."""
        if not 0 < self.micro_batch < len(xt):
            return self.counted(self.network(xt, timestep, cond))
        parts = [slice(at, at + self.micro_batch) for at in range(0, len(xt), self.micro_batch)]
        outputs = [self.network(xt[rows], timestep[rows], {key: value[rows] for key, value in cond.items()}) for rows in parts]
        return self.counted(torch.cat(outputs))

    def features(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
        """What the network's middle makes of xt, (B, F, h, w); its family's network says where the middle is."""
        return self.counted(self.network.features(xt, self.schedule.timestep_of(t), cond))

    def forward(self, xt: Tensor, t: Tensor, cond: Any, *, guidance: float | Tensor = 1.0) -> Tensor:
        """E[x0 | xt] under guidance, one scale or (B,). xt (B, C, H, W), t (B,) in [0, 1] -> (B, C, H, W)."""
        if not isinstance(guidance, Tensor) and guidance == 1.0:
            return to_x0(self.predict(xt, t, cond), xt, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction)
        return guide(*self.pair(xt, t, cond), guidance)

    def pair(self, xt: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional) x0 from one network call on the doubled batch; the latter's prompt is `negative`, if any."""
        away = self.uncond if self.negative is None else self.negative
        if away is None:
            raise ValueError("guidance needs the unconditional prompt: give Denoiser its `uncond`")
        # without its prompt a sample is told the same scale as with it
        other = repeat(away, len(xt)) | {key: cond[key] for key in SCALE if key in cond}
        both = join([cond, other])
        conditional, unconditional = self(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
        return conditional, unconditional
