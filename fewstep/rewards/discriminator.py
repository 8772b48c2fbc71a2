"""DMD2's adversarial loss as a reward: a discriminator of renoised latents that learns while the student does (arXiv 2405.14867)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, repeat, widened
from fewstep.levels import noise_levels
from fewstep.types import Sample, Signal


class Head(nn.Module):
    """Features (B, F, h, w) of a denoiser's middle -> one logit each, (B,)."""

    def __init__(self, features: int, *, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(features, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


class Latents(Protocol):
    """A tensor (N, C, H, W), or what can be asked for rows of one."""

    shape: torch.Size

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class Discriminator:
    """An OnlineReward: log sigmoid of the logit that a renoised sample is real, and its gradient in x0.

    backbone: a frozen denoiser whose middle sees xt under the empty prompt (its `uncond`), so that real latents need no
    captions; the head alone is trained. real (N, C, H, W): latents of real pictures, as the student's own are scaled; several where a run
    trains at several sizes. What is read of them is rows by their numbers, so they may lie on disk.
    """

    def __init__(self, backbone: Denoiser, head: nn.Module, *real: Latents, t_range: tuple[float, float] = (0.02, 0.98)):
        if backbone.uncond is None:
            raise ValueError("the discriminator looks at latents under the empty prompt: give its Denoiser `uncond`")
        self.backbone, self.module, self.t_range = backbone, head, t_range
        self.real = {tuple(latents.shape[1:]): latents for latents in real}

    def features(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the frozen backbone's middle makes of x0 (B, C, H, W) renoised to t (B,), without a prompt; (B, F, h, w)."""
        xt = self.backbone.schedule.noised(x0, t, noise)
        return widened(self.backbone.features(xt, t, repeat(self.backbone.uncond, len(x0))))

    def draw_for_call(self, sample: Sample) -> dict[str, Tensor]:
        """Times t (B,), stratified over each group, and noise (B, C, H, W) at which a call looks at the sample."""
        return {"t": noise_levels(sample.group, self.t_range, "stratified"), "noise": torch.randn_like(sample.x0)}

    def __call__(self, sample: Sample, **drawn: Tensor) -> Signal:
        """drawn: as `draw_for_call` gives it."""
        drawn = drawn or self.draw_for_call(sample)
        with torch.enable_grad():
            x0 = sample.x0.detach().requires_grad_()
            # the generator's non-saturating loss, with its sign turned
            score = F.logsigmoid(self.module(self.features(x0, drawn["t"], drawn["noise"])))
            (direction,) = torch.autograd.grad(score.sum(), x0)
        return Signal(score.detach(), direction)

    def draw(self, sample: Sample) -> dict[str, Tensor]:
        """Real latents (B, C, H, W), times t (B,) stratified over the batch in a random order, and noise (B, 2, C, H, W) of real and
        student's latents."""
        x0 = sample.x0.detach()
        latents = self.real[tuple(x0.shape[1:])]
        real = latents[torch.randint(len(latents), (len(x0),))].to(x0)
        t = noise_levels(torch.zeros_like(sample.group), self.t_range, "stratified")[torch.randperm(len(x0))]
        noise = torch.randn(2, *x0.shape, dtype=x0.dtype, device=x0.device)
        return {"real": real, "t": t, "noise": noise.transpose(0, 1)}

    def loss(self, sample: Sample, **drawn: Tensor) -> Tensor:
        """Binary cross-entropy of real latents against the student's, at the same noise levels. drawn: as `draw` gives it."""
        drawn = drawn or self.draw(sample)
        real, t, noise = drawn["real"], drawn["t"], drawn["noise"].transpose(0, 1)
        with torch.no_grad():  # the backbone is not trained
            features = self.features(torch.cat([real, sample.x0.detach()]), torch.cat([t, t]), noise.flatten(0, 1))
        logits = self.module(features)
        return F.softplus(-logits[: len(real)]).mean() + F.softplus(logits[len(real) :]).mean()
