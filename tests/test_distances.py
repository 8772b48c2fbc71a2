import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fewstep.evaluate.distances import bootstrap, diversity, frechet, frechet_distance, moments, precision_recall


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def covariance(d, seed):
    a = normal(d, 2 * d, seed=seed)
    return a @ a.T / (2 * d)


def rotation(d, seed):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


# Frechet distance


def test_frechet_of_commuting_gaussians():
    mean_a, mean_b = normal(5, seed=1), normal(5, seed=2)
    std_a, std_b = normal(5, seed=3).abs(), normal(5, seed=4).abs()
    q = rotation(5, 5)
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    value = frechet_distance(mean_a, q @ torch.diag(std_a**2) @ q.T, mean_b, q @ torch.diag(std_b**2) @ q.T)
    assert value == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_frechet_of_general_gaussians(d):
    a, b = covariance(d, 1), covariance(d, 2)
    assert (a @ b - b @ a).abs().max() > 1e-3
    cross = np.trace(scipy.linalg.sqrtm((a @ b).numpy()).real)
    expected = float(a.trace() + b.trace()) - 2 * cross
    assert frechet_distance(torch.zeros(d), a, torch.zeros(d), b) == pytest.approx(expected, abs=1e-8)


def test_frechet_is_symmetric_and_zero_for_the_same():
    a, b, m, n = covariance(16, 1), covariance(16, 2), normal(16, seed=3), normal(16, seed=4)
    assert frechet_distance(m, a, n, b) == pytest.approx(frechet_distance(n, b, m, a), rel=1e-10)
    assert frechet_distance(m, a, m, a) < 1e-10
    x = normal(40, 16, seed=5)
    assert frechet(x, x) < 1e-10
    assert frechet(x, x[torch.randperm(40, generator=generator(6))]) < 1e-10


def test_frechet_is_invariant_under_motion_and_scales_as_a_square():
    x, y, q, shift = normal(60, 8, seed=1), 1.5 * normal(50, 8, seed=2) + 0.3, rotation(8, 3), normal(8, seed=4)
    value = frechet(x, y)
    assert frechet(x @ q + shift, y @ q + shift) == pytest.approx(value, rel=1e-10)
    assert frechet(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-10)


def test_frechet_of_a_singular_covariance():
    line = torch.diag(torch.tensor([4.0, 0.0]))
    assert frechet_distance(torch.zeros(2), line, torch.zeros(2), torch.eye(2)) == pytest.approx(1 + 1, abs=1e-10)


def test_frechet_of_samples_approaches_the_closed_form():
    a, b = covariance(6, 1), covariance(6, 2)
    x = normal(100_000, 6, seed=3) @ torch.linalg.cholesky(a).T
    y = normal(100_000, 6, seed=4) @ torch.linalg.cholesky(b).T + 0.2
    expected = frechet_distance(torch.zeros(6), a, torch.full((6,), 0.2), b)
    assert frechet(x, y) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("n", [3, 8])
def test_frechet_needs_more_features_than_dimensions(n):
    with pytest.raises(ValueError, match="singular"):
        frechet(normal(n, 8), normal(20, 8))
    with pytest.raises(ValueError, match="second set has"):
        frechet(normal(20, 8), normal(n, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    x = normal(20, 4)
    x[3, 1] = bad
    for distance in (frechet, precision_recall):
        with pytest.raises(ValueError, match="1 of 20"):
            distance(x, normal(20, 4, seed=1))
    with pytest.raises(ValueError, match="1 of 20"):
        diversity(x, torch.arange(20) // 2)


def test_sets_of_different_dimension_are_refused():
    with pytest.raises(ValueError, match="4 and 5"):
        frechet(normal(20, 4), normal(20, 5))
    with pytest.raises(ValueError, match="must be"):
        frechet(normal(20), normal(20, 4))


# Precision and recall


def test_precision_and_recall_of_disjoint_and_identical_sets():
    x = normal(30, 4)
    assert precision_recall(x, x + 100) == (0, 0)
    assert precision_recall(x, x.clone()) == (1, 1)


def test_precision_and_recall_of_a_subset():
    x = torch.cat([normal(20, 2, seed=1), normal(20, 2, seed=2) + 50])
    precision, recall = precision_recall(x, x[:20])
    assert precision == 1
    assert recall == 0.5
    assert precision_recall(x[:20], x) == (0.5, 1)


def test_precision_and_recall_by_hand():
    # k = 1 on a line: reference 0, 1, 5 with radii 1, 1, 4; generated 0.5, 9.5, 20 with radii 9, 9, 10.5
    reference, generated = torch.tensor([[0.0], [1], [5]]), torch.tensor([[0.5], [9.5], [20]])
    assert precision_recall(reference, generated, k=1) == (1 / 3, 1)
    # generated 3, 3.1, 20 with radii 0.1, 0.1, 16.9: 3 and 3.1 lie within 4 of 5; of the reference 5 alone within 16.9 of 20
    assert precision_recall(reference, torch.tensor([[3.0], [3.1], [20]]), k=1) == (2 / 3, 1 / 3)


def test_a_ball_holds_its_boundary():
    line = torch.tensor([[0.0], [1], [2]])
    assert precision_recall(line, torch.tensor([[3.0], [90], [100]]), k=1) == (1 / 3, 1)


def test_precision_needs_more_than_k():
    with pytest.raises(ValueError, match="3-th nearest"):
        precision_recall(normal(3, 2), normal(10, 2))


# Diversity


def test_diversity_of_identical_orthogonal_and_opposite_features():
    group = torch.tensor([0, 1, 0, 1])
    same = normal(2, 5)[group]
    assert diversity(same, group) == pytest.approx(0, abs=1e-12)
    assert diversity(3 * torch.eye(4), group) == pytest.approx(1, abs=1e-12)
    assert diversity(torch.tensor([[1.0, 0], [0, 1], [-2, 0], [0, -3]]), group) == pytest.approx(2, abs=1e-12)


def test_diversity_is_the_mean_over_groups_of_the_mean_over_pairs():
    x, group = normal(9, 3), torch.tensor([4, 7, 4, 7, 7, 4, 7, 9, 9])
    u = torch.nn.functional.normalize(x, dim=1)
    means = []
    for g in (4, 7, 9):
        rows = (group == g).nonzero()[:, 0].tolist()
        pairs = [1 - u[i] @ u[j] for i in rows for j in rows if i < j]
        means.append(sum(pairs) / len(pairs))
    assert diversity(x, group) == pytest.approx(float(sum(means) / 3), abs=1e-12)
    order = torch.randperm(9, generator=generator(1))
    assert diversity(x[order], group[order]) == pytest.approx(diversity(x, group), abs=1e-12)


def test_diversity_refuses_a_group_of_one():
    with pytest.raises(ValueError, match="at least two"):
        diversity(normal(3, 2), torch.tensor([0, 0, 1]))


# Bootstrap


def test_bootstrap_is_deterministic_and_holds_the_value():
    x = normal(50)
    interval = bootstrap(lambda index: float(x[index].mean()), 50, draws=200, seed=1)
    assert interval == bootstrap(lambda index: float(x[index].mean()), 50, draws=200, seed=1)
    assert interval != bootstrap(lambda index: float(x[index].mean()), 50, draws=200, seed=2)
    assert interval[0] < float(x.mean()) < interval[1]
    narrow = bootstrap(lambda index: float(x[index].mean()), 50, draws=200, seed=1, level=0.5)
    assert interval[0] < narrow[0] < narrow[1] < interval[1]
    with pytest.raises(ValueError, match="two independent units"):
        bootstrap(lambda index: 0.0, 1, draws=10, seed=0)


def test_cluster_bootstrap_covers_where_a_naive_one_does_not():
    trials, clusters, size = 200, 30, 8
    cluster = naive = 0
    for trial in range(trials):
        shared = normal(clusters, 1, seed=2 * trial)
        x = shared + 0.3 * normal(clusters, size, seed=2 * trial + 1)  # the true mean is 0
        means, flat = x.mean(1), x.flatten()
        low, high = bootstrap(lambda index, x=means: float(x[index].mean()), clusters, draws=200, seed=trial)
        cluster += low < 0 < high
        low, high = bootstrap(lambda index, x=flat: float(x[index].mean()), len(flat), draws=200, seed=trial)
        naive += low < 0 < high
    assert 0.88 <= cluster / trials <= 0.98  # a percentile interval of 30 clusters: a little under 95%
    assert naive / trials < 0.7


def test_centred_bootstrap_of_the_frechet_distance():
    """Its interval holds the value, which the plain one misses, and covers the mean over samples of that size."""
    n, d = 80, 12
    reference = (torch.zeros(d), torch.eye(d))

    def value(x):
        return frechet_distance(*reference, *moments(x))

    samples = [0.2 + normal(n, d, seed=seed) for seed in range(60)]
    expected = float(np.mean([value(x) for x in samples]))
    covered = 0
    for seed, x in enumerate(samples):
        low, high = bootstrap(lambda index, x=x: value(x[index]), n, draws=60, seed=seed, centre=True)
        assert low < value(x) < high
        covered += low < expected < high
    assert 0.85 <= covered / len(samples) <= 1
    plain = bootstrap(lambda index: value(samples[0][index]), n, draws=60, seed=0)
    assert plain[0] > value(samples[0])
