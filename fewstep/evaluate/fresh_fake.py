"""How far a finished student is from its teacher, judged by a fake of its own (method, "Its value").

The fake of a run has chased a moving student, so the KL it reports is too small by its lag, KL(q || q_fake). A fresh one, trained
on the frozen student alone until it finds no more KL and learns no more, has none: the difference is what the run did not see. Whatever the
fake, the KL that it finds is too small on average, so of two that differ the larger is the nearer.
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

FIRST = 32  # the first cycle is one in so many of the longest training
RISE = 0.01  # a cycle, as long as all before it, whose KL is not above theirs by this share of it has found nothing new
FALL = 0.001  # nor learned anything, where its held-out loss is not below theirs by this share


class Verdict(NamedTuple):
    """KL to the teacher in the unit of R_dm's score, of the same samples at the same noise."""

    own: float  # by the run's fake
    fresh: float  # by the fresh fake
    gap: float  # fresh - own, mean over batches
    gap_error: float  # standard error of the gap over batches
    converged: bool  # KL and held-out loss stand still, and it is not below the run's own: else it is known to be a lower bound alone
    updates: int  # of the fresh fake
    kls: list[float]  # by the fresh fake, before its training and after each cycle of it
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
    """Train `fake` on a frozen student's samples and ask it and the run's own for the KL.

    matching: R_dm as the run holds it; draw: a fresh batch of the frozen student's samples at each call; precision: the networks'
    autocast context. The rate falls from lr to zero in cycles, each as long as all before it together: at a constant rate the weights
    scatter, and the KL that they find is smaller for it. It ends when a cycle has neither raised the KL nor lowered the loss on `batches`
    held-out batches, or where the next one would go beyond `most` updates in all.
    """
    fresh = copy.copy(matching)  # the same settings and teacher, another fake
    fresh.fake = fresh.module = fake
    optimizer = torch.optim.AdamW([p for p in fake.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    with torch.no_grad(), precision():
        held = [hold(matching, draw()) for _ in range(batches)]

    def train(length: int) -> None:
        for update in range(length):
            for settings in optimizer.param_groups:
                settings["lr"] = lr * (1 - update / length)
            with precision():
                loss = fresh.loss(draw())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    found, updates, length = [asked(fresh, held, precision)], 0, max(most // FIRST, 1)
    while not stopped(kls := [float(kl.mean()) for kl, _ in found], losses := [loss for _, loss in found]) and updates + length <= most:
        train(length)
        updates += length
        length = updates
        found.append(asked(fresh, held, precision))
    kl, own = found[-1][0], asked(matching, held, precision)[0]
    gap = kl - own
    gap_error = float(gap.std() / len(gap) ** 0.5)
    return Verdict(
        own=float(own.mean()),
        fresh=float(kl.mean()),
        gap=float(gap.mean()),
        gap_error=gap_error,
        converged=stopped(kls, losses) and not finds_less(float(gap.mean()), gap_error),
        updates=updates,
        kls=kls,
        heldout=losses,
    )


def stopped(kls: list[float], losses: list[float]) -> bool:
    """Whether the last cycle has neither raised the KL nor lowered the held-out loss; the first three are too short to say. A fake that
    still learns finds more later, though the KL of one cycle may not show it."""
    if len(kls) <= 4:
        return False
    highest, lowest = max(kls[:-1]), min(losses[:-1])
    return kls[-1] <= highest + RISE * abs(highest) and losses[-1] >= (1 - FALL) * lowest


def finds_less(gap: float, gap_error: float) -> bool:
    """Whether the fresh KL is below the run's own by more than chance, as that of a fake that has learned what it can is not."""
    return gap < -2 * gap_error


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
