"""The judge on Gaussians, where the KL and the lag of a shifted fake are known."""

from contextlib import nullcontext

import torch
from gaussians import SHAPE, D, gaussian_denoiser, spd, vector
from torch import nn

from fewstep.denoiser import Denoiser
from fewstep.evaluate.judge import judge
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


def test_a_fresh_fake_finds_the_kl_that_a_lagging_one_hides():
    torch.manual_seed(0)
    cov, schedule = spd(1), Flow()
    mu, m = vector(0), vector(0) + 1.5 * vector(3)
    factor = torch.linalg.cholesky(cov)
    teacher = gaussian_denoiser(mu, cov)
    lagging = gaussian_denoiser(m + 0.5 * (mu - m), cov)  # half way behind the student
    matching = DistributionMatching(teacher, lagging, schedule, t_range=(0.05, 0.95), score_weight="matching")

    def draw():
        x0 = (m + torch.randn(64, D, dtype=torch.float64) @ factor.T).view(64, *SHAPE)
        k = torch.zeros(64, dtype=torch.long)
        return Sample(x0, torch.ones(64), k, {}, [""] * 64, torch.arange(64), lambda x: x)

    fresh = Denoiser(Shifted(mu, cov), schedule, "sample")  # starts as the teacher
    verdict = judge(matching, fresh, draw, updates=150, lr=0.1, batches=12, precision=nullcontext)
    exact = DistributionMatching(teacher, gaussian_denoiser(m, cov), schedule, t_range=(0.05, 0.95), score_weight="matching")
    wanted = -torch.stack([exact.evaluate(s.x0, s.cond, s.group).score.mean() for s in (draw() for _ in range(40))]).mean()
    # eq. (4): the KL of a fake that is a half behind is smaller by KL(q || q_fake), which for equal covariances is (1/2)^2 of the whole
    assert abs(verdict.fresh - wanted) < 0.1 * wanted
    assert abs(verdict.gap - 0.25 * wanted) < 0.05 * wanted + 3 * verdict.gap_error
    assert verdict.own < 0.85 * verdict.fresh
    assert len(verdict.heldout) == 9 and verdict.heldout[-1] < verdict.heldout[0]
    assert abs(verdict.heldout[-1] - verdict.heldout[-2]) < 0.01 * (verdict.heldout[0] - verdict.heldout[-1])
    assert lagging is matching.fake  # the run's own R_dm is left as it was
