"""A linear reward tilts a Gaussian student, through DistributionMatching, Student, weights and Trainer."""

import math

import pytest
import torch
from gaussians import Affine, D, flat, joint_points, marginal, spd, unflat, vector
from test_distribution import kl

from fewstep import losses
from fewstep.config import Config, ReuseConfig, StudentConfig
from fewstep.denoiser import Denoiser
from fewstep.prompts import Batches
from fewstep.rewards.distribution import DistributionMatching
from fewstep.schedule import Flow
from fewstep.student import Student
from fewstep.trainer import Trainer
from fewstep.types import Signal, Term
from fewstep.weights import Adaptive

SCHEDULE = Flow()
TIMES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
LEVELS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)  # w_t
BETA, PULL = 2.0, vector(5)
MU, COV = vector(0), spd(1)


def tilted_mean():
    """m* = mu + (1 / beta) [sum_t w_t alpha_t^2 C_{p,t}^-1]^-1 a."""
    precision = sum(w * SCHEDULE.alpha(t) ** 2 * torch.linalg.inv(marginal(COV, t, SCHEDULE)) for t, w in zip(TIMES, LEVELS, strict=True))
    return MU + torch.linalg.solve(precision, PULL) / BETA


class Exact(torch.nn.Module):
    """E[x0 | xt] of the affine network's output as it is now: as a fake, one that never lags."""

    def __init__(self, network):
        super().__init__()
        self.network = [network]  # a list, so that its parameters stay the student's

    def forward(self, xt, timestep, cond):
        t = SCHEDULE.t_of(timestep)
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        m, L = self.network[0].m.detach(), self.network[0].L.detach()
        variance, axes = torch.linalg.eigh(L @ L.T)
        y = (flat(xt) - alpha * m) @ axes
        return unflat(m + (alpha * variance / (alpha**2 * variance + sigma**2) * y) @ axes.T)


def exact(network):
    return Denoiser(Exact(network), SCHEDULE, "sample")


def gradient(m, factor):
    """Gradient in (m, L) of beta sum_t w_t KL_t - E[a.x], from R_dm's direction and the library's loss, by sigma points."""
    network = Affine(m, factor)
    student = Student(Denoiser(network, SCHEDULE, "sample"), SCHEDULE, [1.0])
    matching = DistributionMatching(
        exact(Affine(MU, torch.linalg.cholesky(COV))), exact(Affine(m.detach(), factor.detach())), SCHEDULE, normalize="none"
    )
    z, eps = joint_points()
    x0 = student.predict(z, 0, {})
    loss = losses.pathwise(x0, unflat(PULL.expand(len(z), D)))
    for t, w in zip(TIMES, LEVELS, strict=True):
        time = t.expand(len(z))
        direction = matching.evaluate(x0.detach(), {}, torch.arange(len(z)), t=time, noise=eps).direction
        loss = loss + BETA * losses.pathwise(x0, direction, weight=w * SCHEDULE.snr(time))
    loss.backward()
    return network.m.grad * D, network.L.grad * D


def test_the_optimum_under_a_linear_reward_moves_the_mean_alone():
    factor = torch.linalg.cholesky(COV)
    at_optimum = gradient(tilted_mean(), factor)
    for value in at_optimum:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-10)
    # the exponential tilt of the teacher at t = 0, mu + S a / beta, is no optimum of the sum over noise levels; nor is another spread
    assert gradient(MU + COV @ PULL / BETA, factor)[0].norm() > 0.1
    assert gradient(tilted_mean(), 1.1 * factor)[1].norm() > 0.1


def test_descent_on_the_libraries_gradient_arrives_there():
    m, factor = vector(2), torch.linalg.cholesky(spd(3))
    for _ in range(400):
        grad_m, grad_L = gradient(m, factor)
        m, factor = m - 0.2 * grad_m, factor - 0.2 * grad_L
    torch.testing.assert_close(m, tilted_mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(factor @ factor.T, COV, rtol=0, atol=1e-6)


class Pull:
    """The reward a.x, as one that is not ours would be written."""

    module = None

    def __init__(self, a):
        self.a = a

    def __call__(self, sample):
        return Signal(flat(sample.x0) @ self.a, unflat(self.a.expand(len(sample.x0), D)))


def matching_kl(m, cov, t_range, nodes=200):
    """-E[score] with W = integral of w: integral over t_range of w (KL_t - KL at its end), w = 1 / SNR, by the trapezoid rule."""

    times = torch.linspace(*t_range, nodes, dtype=torch.float64)
    t = times[:, None, None]
    a = SCHEDULE.alpha(times)[:, None]
    found = kl(a * m, marginal(cov, t, SCHEDULE), a * MU, marginal(COV, t, SCHEDULE))
    return float(torch.trapezoid((found - found[-1]) / SCHEDULE.snr(times), times))


@pytest.mark.parametrize("size", [0.2, 1.0, 5.0])
def test_the_adaptive_weight_settles_at_its_budget(size):
    """Eq. (7) through the Trainer: the KL of the student that training leaves, in closed form, is within 10% of the budget."""
    torch.manual_seed(0)
    t_range = (0.05, 0.9)
    # a student that cannot reach its teacher (its spread is fixed), so that matching alone leaves a KL to take a multiple of
    network = Affine(MU, 0.6 * torch.linalg.cholesky(COV))
    student = Student(Denoiser(network, SCHEDULE, "sample"), SCHEDULE, [1.0])
    matching = DistributionMatching(
        exact(Affine(MU, torch.linalg.cholesky(COV))), exact(network), SCHEDULE, t_range=t_range, score_weight="matching"
    )
    weights = Adaptive({"pull": 1.0}, budget=1.5, warmup=60, eta=0.03, decay=0.98)
    own = StudentConfig(lr=3e-3, decay=0.0, ema=0.98, betas=(0.9, 0.99))
    trainer = Trainer(
        student, {"m": network.m}, {"dm": Term(matching, anchor=True), "pull": Term(Pull(size * PULL))},
        Batches(["dummy"], groups=32, group_size=16, seed=0), encode=lambda prompts: {}, decode=lambda x0: x0, latent_shapes=[(D, 1, 1)],
        config=Config(steps=1, student=own, reuse=ReuseConfig(rollout=1)), weights=weights,
    )  # fmt: skip
    trainer.new_rollout = lambda until=None: student.rollout(
        torch.randn(512, D, 1, 1, dtype=torch.float64), {}, group=torch.arange(512) // 16, prompts=["dummy"] * 512
    )
    cov = (network.L @ network.L.T).detach()
    reached = []
    for update in range(600):
        trainer.step()
        if update >= 300:
            reached.append(matching_kl(network.m.detach(), cov, t_range, nodes=40))
    alone = matching_kl(MU, cov, t_range)
    assert weights.b == pytest.approx(1.5 * alone, rel=0.1)
    assert sum(reached) / len(reached) == pytest.approx(weights.b, rel=0.1)
    assert weights.log_weight < math.log(weights.cap)
    assert float((network.m.detach() - MU) @ PULL) > 0  # and what is spent is spent in the reward's favour
