"""The KL that a fresh fake finds, on Gaussians, where the KL and the lag of a shifted fake are known."""

from contextlib import nullcontext

import pytest
import torch
from gaussians import SHAPE, D, gaussian_denoiser, spd, vector
from torch import nn

from fewstep.denoiser import Denoiser
from fewstep.evaluate.fresh_fake import fresh_kl, stopped
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.types import Sample


class Shifted(nn.Module):
    """The exact denoiser of N(m + shift, S), with the shift to be learned."""

    def __init__(self, mean, cov):
        super().__init__()
        self.mean, self.cov, self.shift = mean, cov, nn.Parameter(torch.zeros_like(mean))

    def forward(self, xt, timestep, cond):
        return gaussian_denoiser(self.mean + self.shift, self.cov).network(xt, timestep, cond)


def setting():
    """(teacher, R_dm whose fake is half way behind the student, draw, R_dm with the exact fake, a fake that starts as the teacher)."""
    torch.manual_seed(0)
    cov, schedule = spd(1), Flow()
    mu, m = vector(0), vector(0) + 1.5 * vector(3)
    factor = torch.linalg.cholesky(cov)
    teacher = gaussian_denoiser(mu, cov)
    lagging, exact = (
        DistributionMatching(teacher, gaussian_denoiser(mean, cov), schedule, t_range=(0.05, 0.95), score_weight="matching")
        for mean in (m + 0.5 * (mu - m), m)
    )

    def draw():
        x0 = (m + torch.randn(64, D, dtype=torch.float64) @ factor.T).view(64, *SHAPE)
        k = torch.zeros(64, dtype=torch.long)
        return Sample(x0, torch.ones(64), {}, [""] * 64, torch.arange(64), k=k)

    return lagging, draw, exact, Denoiser(Shifted(mu, cov), schedule, "sample")


def test_a_fresh_fake_finds_the_kl_that_a_lagging_one_hides():
    matching, draw, exact, fresh = setting()
    lagging = matching.fake
    verdict = fresh_kl(matching, fresh, draw, most=1500, lr=0.03, batches=12, precision=nullcontext)
    wanted = -torch.stack([exact.evaluate(s.x0, s.cond, s.group).score.mean() for s in (draw() for _ in range(40))]).mean()
    # eq. (4): the KL of a fake that is a half behind is smaller by KL(q || q_fake), which for equal covariances is (1/2)^2 of the whole
    assert abs(verdict.fresh - wanted) < 0.1 * wanted
    assert abs(verdict.gap - 0.25 * wanted) < 0.05 * wanted + 3 * verdict.gap_error
    assert verdict.own < 0.85 * verdict.fresh
    assert verdict.converged and verdict.updates < 1500  # it stops when it knows what there is to know
    assert len(verdict.kls) == len(verdict.heldout) and verdict.kls[-1] == verdict.fresh and verdict.heldout[-1] < verdict.heldout[0]
    assert abs(verdict.kls[0]) < 1e-9 * wanted  # the teacher as a fake sees no distance
    assert lagging is matching.fake  # the run's own R_dm is left as it was


def test_a_fresh_fake_that_had_too_little_time_says_so():
    matching, draw, _, fresh = setting()
    verdict = fresh_kl(matching, fresh, draw, most=30, lr=0.003, batches=4, precision=nullcontext)
    assert not verdict.converged and verdict.updates == 1 + 1 + 2 + 4 + 8 and len(verdict.kls) == 6  # 16 more are beyond 30
    assert verdict.fresh < verdict.own  # it knows less than the run's own


def test_a_fresh_fake_that_learns_nothing_has_not_converged():
    """Its KL stands still, below the run's own: whatever the fake, the KL that it finds is too small on average."""
    matching, draw, _, fresh = setting()
    verdict = fresh_kl(matching, fresh, draw, most=200, lr=0.0, batches=4, precision=nullcontext)
    assert stopped(verdict.kls, verdict.heldout) and verdict.updates < 200
    assert verdict.gap < -2 * verdict.gap_error and not verdict.converged


def test_a_fresh_fake_beside_one_that_lags_not_at_all_has_converged():
    """It comes as near as it can, which is from below."""
    _, draw, exact, fresh = setting()
    verdict = fresh_kl(exact, fresh, draw, most=1024, lr=0.03, batches=12, precision=nullcontext)
    assert verdict.converged and abs(verdict.gap) < 0.02 * verdict.own


@pytest.mark.parametrize(
    "kls, whether",
    [
        ([0.0, 8.0, 8.0, 8.0], False),  # three short cycles say nothing
        ([0.0, 7.0, 8.0, 9.0, 9.08], True),
        ([0.0, 7.0, 8.0, 9.0, 9.1], False),
        ([0.0, 7.0, 8.0, 9.0, 8.5], True),
        ([0.0, 7.0, 9.0, 8.0, 8.5], True),  # of the best, not of the one before
        ([0.0, -9.5, -9.0, -8.0, -7.95], True),
        ([0.0, 5.0, 7.0, 8.0, 8.5, 8.55], True),
    ],
)
def test_a_kl_has_stopped_rising(kls, whether):
    assert stopped(kls, [1.0] * len(kls)) is whether


@pytest.mark.parametrize("losses, whether", [([2.0, 3.0, 2.0, 2.0, 1.999], True), ([2.0, 3.0, 2.0, 2.0, 1.997], False)])
def test_a_fake_that_still_learns_has_not_stopped(losses, whether):
    """`gndmr`, seed 2: after 184 updates the KL stood at 16.6, 1% above the cycle before; after 1472 at 18.8."""
    assert stopped([0.0, 7.0, 8.0, 9.0, 9.08], losses) is whether


def test_the_rate_has_fallen_to_zero_wherever_the_kl_is_taken(monkeypatch):
    """At a constant rate the weights scatter, and a KL stops rising for their noise."""
    matching, draw, _, fresh = setting()
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    verdict = fresh_kl(matching, fresh, draw, most=64, lr=0.01, batches=2, precision=nullcontext)
    cycles = [2, 2, 4, 8, 16, 32][: len(verdict.kls) - 1]
    assert rates == pytest.approx([0.01 * (1 - i / length) for length in cycles for i in range(length)]) and len(cycles) > 3
