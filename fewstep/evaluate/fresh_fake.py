"""How far a finished student is from its teacher, judged by a fake of its own (method, "Its value").

The fake of a run has chased a moving student, so the KL it reports is too small by its lag, KL(q || q_fake). A fresh one, trained
on the frozen student alone until the KL that it finds no longer rises, has none: the difference is what the run did not see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.rewards.distribution import DistributionMatching
from fewstep.types import Sample

ROUNDS = 30  # that the longest training has: between two of them the KL is taken
RISE = 0.01  # a round whose KL is not above the best before it by this share of it has found nothing new
PATIENCE = 2  # such rounds in a row, after which the fake is taken to know what it can learn at this rate


class Verdict(NamedTuple):
    """KL to the teacher in the unit of R_dm's score, of the same samples at the same noise."""

    own: float  # by the run's fake
    fresh: float  # by the fresh fake
    gap: float  # fresh - own, mean over batches
    gap_error: float  # standard error of the gap over batches
    converged: bool  # the KL had stopped rising before the updates were used up: else `fresh` is a lower bound
    updates: int  # of the fresh fake
    kls: list[float]  # by the fresh fake, before its training, after each round at a constant rate, and at the end
    heldout: list[float]  # its held-out loss, likewise


class Held(NamedTuple):
    """A batch that no fake is trained on, with what does not depend on the fake."""

    sample: Sample
    t: Tensor
    noise: Tensor
    xt: Tensor
    teacher: Tensor  # its prediction, unguided


def fresh_kl(
    matching: DistributionMatching,
    fake: Denoiser,
    draw: Callable[[], Sample],
    *,
    most: int,
    lr: float,
    batches: int = 16,
    precision: Callable[[], Any],
) -> Verdict:
    """Train `fake`, which starts as the teacher, on a frozen student's samples and ask both fakes for the KL.

    matching: R_dm as the run holds it; draw: a fresh batch of the frozen student's samples at each call; precision: the networks'
    autocast context. The rate stays at lr until the KL that the fake finds on `batches` held-out batches has stopped rising: a rate that
    falls by a plan stops any curve. Then it falls to zero over one round more, which averages the last samples out. `most`: updates in all.
    """
    fresh = copy.copy(matching)  # the same settings and teacher, another fake
    fresh.fake = fresh.module = fake
    optimizer = torch.optim.AdamW([p for p in fake.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    with torch.no_grad(), precision():
        held = [hold(matching, draw()) for _ in range(batches)]
    length = max(most // ROUNDS, 1)

    def train(falling: bool) -> None:
        for update in range(length):
            for settings in optimizer.param_groups:
                settings["lr"] = lr * (1 - update / length) if falling else lr
            with precision():
                loss = fresh.loss(draw())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    found = [asked(fresh, held, precision)]
    kls, idle, updates = [float(found[0][0].mean())], 0, 0
    while idle < PATIENCE and updates + 2 * length <= most:
        train(falling=False)
        updates += length
        found.append(asked(fresh, held, precision))
        kl = float(found[-1][0].mean())
        idle = idle + 1 if kl <= max(kls) + RISE * abs(max(kls)) else 0
        kls.append(kl)
    train(falling=True)
    found.append(asked(fresh, held, precision))
    kl, own = found[-1][0], asked(matching, held, precision)[0]
    gap = kl - own
    return Verdict(
        own=float(own.mean()),
        fresh=float(kl.mean()),
        gap=float(gap.mean()),
        gap_error=float(gap.std() / len(gap) ** 0.5),
        converged=idle >= PATIENCE,
        updates=updates + length,
        kls=[*kls, float(kl.mean())],
        heldout=[loss for _, loss in found],
    )


def hold(matching: DistributionMatching, sample: Sample) -> Held:
    """A batch at noise levels that cover the range evenly, seen by the teacher."""
    t = matching.noise_levels(torch.zeros_like(sample.group), "stratified")
    t, noise = t[torch.randperm(len(t), device=t.device)], torch.randn_like(sample.x0)
    xt = matching.schedule.noised(sample.x0, t, noise)
    return Held(sample, t, noise, xt, matching.teacher(xt, t, sample.cond))


def asked(matching: DistributionMatching, held: list[Held], precision: Callable[[], Any]) -> tuple[Tensor, float]:
    """(the KL by `matching.fake` in each held batch, (batches,) float64; that fake's mean loss on them), one pass of it a batch."""
    kls, losses = [], []
    for sample, t, noise, xt, teacher in held:
        with precision():
            loss, score = matching.known(sample, xt, t, noise, teacher=teacher)
        losses.append(loss)
        kls.append(-score)  # a KL is minus the mean score, eq. (4)
    return torch.tensor(kls, dtype=torch.float64), sum(losses) / len(losses)
