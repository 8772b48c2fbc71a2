"""How far a finished student is from its teacher, judged by a fake of its own (method, "Its value").

The fake of a run has chased a moving student, so the KL it reports is too small by its lag, KL(q || q_fake). A fresh one, trained
on the frozen student alone until its held-out loss no longer falls, has none: the difference is what the run did not see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fewstep.denoiser import Denoiser
from fewstep.rewards.distribution import DistributionMatching, noise_levels
from fewstep.types import Sample


class Verdict(NamedTuple):
    """KL to the teacher in the unit of R_dm's score, of the same samples at the same noise."""

    own: float  # by the run's fake
    fresh: float  # by the fresh fake
    gap: float  # fresh - own, mean over batches
    gap_error: float  # standard error of the gap over batches
    heldout: list[float]  # the fresh fake's held-out loss along its training: flat at the end, or it was stopped too early


def judge(
    matching: DistributionMatching,
    fake: Denoiser,
    draw: Callable[[], Sample],
    *,
    updates: int,
    lr: float,
    batches: int = 16,
    checks: int = 8,
    precision: Callable[[], Any],
) -> Verdict:
    """Train `fake`, which starts as the teacher, on a frozen student's samples and ask both fakes for the KL.

    matching: R_dm as the run holds it; draw: a fresh batch of the frozen student's samples at each call; lr falls linearly to zero over
    `updates`; checks: how often the held-out loss is taken, on samples drawn before; precision: the networks' autocast context.
    """
    fresh = copy.copy(matching)  # the same settings and teacher, another fake
    fresh.fake = fresh.module = fake
    optimizer = torch.optim.AdamW([p for p in fake.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    held = [(sample, *at(matching, sample)) for sample in (draw() for _ in range(batches))]

    @torch.no_grad()
    def heldout() -> float:
        with precision():
            return sum(float(fresh.loss(sample, t=t, noise=noise)) for sample, t, noise in held) / len(held)

    losses = [heldout()]
    for update in range(updates):
        for settings in optimizer.param_groups:
            settings["lr"] = lr * (1 - update / updates)
        with precision():
            loss = fresh.loss(draw())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (update + 1) * checks // updates > update * checks // updates:
            losses.append(heldout())
    kls = []
    for sample, t, noise in held:
        with precision():
            # a KL is minus the mean score, eq. (4)
            kls.append([-float(m.evaluate(sample.x0, sample.cond, sample.group, k=sample.k, t=t, noise=noise).score.mean())
                        for m in (matching, fresh)])  # fmt: skip
    kl = torch.tensor(kls, dtype=torch.float64)
    gap = kl[:, 1] - kl[:, 0]
    return Verdict(float(kl[:, 0].mean()), float(kl[:, 1].mean()), float(gap.mean()), float(gap.std() / len(gap) ** 0.5), losses)


def at(matching: DistributionMatching, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, noise) that cover the noise levels evenly over the batch."""
    t = noise_levels(torch.zeros_like(sample.group), matching.t_range, "stratified")
    return t[torch.randperm(len(t), device=t.device)], torch.randn_like(sample.x0)
