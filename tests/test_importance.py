"""Importance weights, eq. (8), by Gauss-Hermite quadrature along the one direction that matters."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fewstep.importance import effective_sample_size, expected_sample_size, log_ratio, move, permitted_updates, weights

SHAPE = (3, 2, 2)


def quadrature(alpha=0.8, sigma=0.6, size=0.5, nodes=80):
    """(log_ratio, probability, xt, v): xt = alpha x0_old + sigma eps, eps on nodes along delta and zero across it."""
    generator = torch.Generator().manual_seed(0)
    old, delta = (torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    delta = delta * size / delta.norm()
    points, probability = np.polynomial.hermite_e.hermegauss(nodes)
    eps = torch.from_numpy(points).view(-1, 1, 1, 1) * delta / delta.norm()
    x0 = old.expand(nodes, *SHAPE)
    a, s = (torch.full((nodes,), value, dtype=torch.float64) for value in (alpha, sigma))
    xt = alpha * x0 + sigma * eps
    return log_ratio(xt, x0, x0 + delta, a, s), torch.from_numpy(probability / probability.sum()), xt, (alpha * size / sigma) ** 2


def test_it_is_the_ratio_of_two_normal_densities_summed_over_dimensions():
    torch.manual_seed(0)
    xt, old, new = (torch.randn(5, *SHAPE, dtype=torch.float64) for _ in range(3))
    alpha, sigma = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64) + 0.1

    def log_density(x0):
        a, s = (value.view(-1, 1, 1, 1) for value in (alpha, sigma))
        return torch.distributions.Normal(a * x0, s).log_prob(xt).flatten(1).sum(1)

    torch.testing.assert_close(log_ratio(xt, old, new, alpha, sigma), log_density(new) - log_density(old), rtol=1e-10, atol=1e-10)


def test_on_policy_every_ratio_is_exactly_one():
    xt, x0 = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE) * 1e3
    ratio = log_ratio(xt, x0, x0.clone(), torch.full((4,), 0.7), torch.full((4,), 0.3))
    assert torch.equal(ratio, torch.zeros(4)) and torch.equal(weights(ratio, rho_max=2.0), torch.ones(4))


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0])
def test_moments_and_truncation_have_their_closed_forms(size):
    ratio, probability, _, v = quadrature(size=size)
    rho = ratio.exp()
    assert float((probability * rho).sum()) == pytest.approx(1, abs=1e-10)
    assert float((probability * rho**2).sum()) == pytest.approx(math.exp(v), rel=1e-10)
    for c in (1.0, 1.5, 2.0):  # the truncated mean has a kink: a fine grid instead of nodes
        z = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        mean = torch.trapezoid(weights(math.sqrt(v) * z - v / 2, rho_max=c) * density, z)
        expected = norm.cdf((math.log(c) - v / 2) / math.sqrt(v)) + c * norm.cdf(-(math.log(c) + v / 2) / math.sqrt(v))
        assert float(mean) == pytest.approx(expected, abs=1e-9)


def test_old_evaluations_give_the_new_expectation_and_mean_reduced_ratios_do_not():
    ratio, probability, xt, _ = quadrature()
    unit = (xt[-1] - xt[0]) / (xt[-1] - xt[0]).norm()
    moved = xt + 0.8 * 0.5 * unit  # xt about the new mean: alpha times the move

    def mean(weight, x):
        return float((probability * weight * (x * unit).flatten(1).sum(1) ** 3).sum())

    still, wanted = mean(1, xt), mean(1, moved)
    assert mean(ratio.exp(), xt) == pytest.approx(wanted, rel=1e-9)
    reduced = (ratio / math.prod(SHAPE)).exp()  # an average over dimensions moves the expectation by a dimension's share
    assert abs(mean(reduced, xt) - still) < 0.2 * abs(wanted - still)


def test_effective_sample_size():
    assert float(effective_sample_size(torch.ones(7))) == 1
    assert float(effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0]))) == 0.25
    w = torch.rand(50, dtype=torch.float64) + 0.1
    expected = float(w.sum() ** 2 / (50 * (w**2).sum()))
    for scale in (1e-200, 1.0, 1e200):
        assert float(effective_sample_size(scale * w)) == pytest.approx(expected, rel=1e-12)


def test_the_expected_size_is_the_limit_of_the_drawn_one():
    torch.manual_seed(0)
    x = torch.randn(200_000, 3, 1, 1, dtype=torch.float64)
    alpha, sigma = torch.full((len(x),), 0.8, dtype=torch.float64), torch.full((len(x),), 0.5, dtype=torch.float64)
    new = x + torch.tensor([0.1, -0.2, 0.15], dtype=torch.float64).view(3, 1, 1)
    v = move(x, new, alpha, sigma)
    assert v.tolist()[:2] == pytest.approx([0.0725 * 0.64 / 0.25] * 2) and v.dtype == torch.float64
    xt = 0.8 * x + 0.5 * torch.randn_like(x)
    drawn = effective_sample_size(log_ratio(xt, x, new, alpha, sigma).exp())
    assert expected_sample_size(v) == pytest.approx(math.exp(-0.0725 * 0.64 / 0.25)) == pytest.approx(float(drawn), rel=0.01)
    # of two levels: E[rho] is 1 at both, and the second moments are averaged
    assert expected_sample_size(torch.tensor([0.0, math.log(3)])) == pytest.approx(0.5)


def test_permitted_updates_follow_the_measured_move():
    for v in (0.01, 0.1, 1.0):
        assert permitted_updates(torch.full((5,), v), min_ess=0.5) == pytest.approx(1 + math.sqrt(math.log(2) / v), rel=1e-6)
    for mixed in ([0.05, 0.4, 2.0], [0.0, 2.0]):  # one that has not moved permits no more to the others
        moves = torch.tensor(mixed, dtype=torch.float64)
        several = permitted_updates(moves, min_ess=0.6)
        assert expected_sample_size((several - 1) ** 2 * moves) == pytest.approx(0.6, rel=1e-6)
    assert permitted_updates(torch.zeros(3), min_ess=0.5) == math.inf
    assert permitted_updates(torch.full((3,), 1e6), min_ess=0.5) == pytest.approx(1, abs=1e-3)


def test_what_has_no_density_or_no_sense_is_refused():
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="sigma = 0"):
        log_ratio(x, x, x, torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="rho_max"):
        weights(torch.zeros(1), rho_max=0.9)
