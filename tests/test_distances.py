import math

import fidelity
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from fewstep.evaluate import distances
from fewstep.evaluate.distances import (
    Moments,
    bootstrap,
    diversity,
    frechet,
    frechet_distance,
    gaussian,
    jackknife,
    kernel_distance,
    moments,
    polynomial,
    precision_recall,
    running_moments,
)


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


def test_running_moments_are_those_of_the_whole(monkeypatch):
    x = normal(57, 6, seed=1) + 1e4  # far from zero
    expected = moments(x)
    for size in (1, 10, 57, 1000):
        monkeypatch.setattr(distances, "CHUNK", size)
        mean, cov = running_moments(x).finish()
        torch.testing.assert_close(mean, expected[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(cov, expected[1], rtol=1e-9, atol=1e-9)
    total = Moments(x[0]).add(x)
    rest = total.without(Moments(x[0]).add(x[:20]))
    assert rest.n == 37
    for found, wanted in zip(rest.finish(), moments(x[20:]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# The same numbers as torch-fidelity's


@pytest.mark.parametrize("n, m", [(400, 400), (300, 450)])
def test_frechet_is_that_of_torch_fidelity(n, m):
    fidelity.load()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    x = normal(n, 96, seed=1) @ covariance(96, 3)
    y = normal(m, 96, seed=2) @ covariance(96, 4) + 0.1
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)[KEY_METRIC_FID]
    assert frechet(x, y) == pytest.approx(theirs, abs=1e-6)
    ours = frechet_distance(*running_moments(x).finish(), *running_moments(y).finish())
    assert ours == pytest.approx(theirs, abs=1e-6) and theirs > 1


def test_kid_is_that_of_torch_fidelity_over_all_pairs():
    fidelity.load()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = normal(120, 24, seed=1), 1.1 * normal(120, 24, seed=2) + 0.2
    # one subset that holds every picture; its own means are over such subsets of 1000
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=120, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kernel_distance(x, y, polynomial, unbiased=True) == pytest.approx(theirs, abs=1e-6)
    subsets = kid_features_to_metric(x, y, kid_subsets=400, kid_subset_size=60, verbose=False)[KEY_METRIC_KID_MEAN]
    assert subsets == pytest.approx(theirs, rel=0.1) and theirs > 0.05


def test_precision_and_recall_are_those_of_torch_fidelity():
    fidelity.load()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real, drawn = normal(90, 5, seed=1), 0.8 * normal(70, 5, seed=2) + 0.9
    theirs = prc_features_to_metric(drawn, real, prc_neighborhood=3, verbose=False)
    ours = precision_recall(real, drawn, k=3)
    assert ours == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]), abs=1e-6)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1


# Kernel distances


def test_kid_of_shifted_gaussians_is_the_closed_form():
    """k = (x.y / d + 1)^3 of N(a, I) and N(b, I) in one dimension: E k(X, Y) = 1 + 3 ab + 3 (a^2 + 1)(b^2 + 1) + E X^3 E Y^3."""

    def mean(a, b):
        return 1 + 3 * a * b + 3 * (a * a + 1) * (b * b + 1) + (a**3 + 3 * a) * (b**3 + 3 * b)

    a, b = 0.2, 0.9
    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    found = [
        kernel_distance(a + normal(400, 1, seed=2 * seed), b + normal(400, 1, seed=2 * seed + 1), polynomial, unbiased=True)
        for seed in range(60)
    ]
    assert np.mean(found) == pytest.approx(expected, abs=3 * np.std(found) / 60**0.5)
    same = [kernel_distance(normal(30, 2, seed=2 * s), normal(30, 2, seed=2 * s + 1), polynomial, unbiased=True) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5  # unbiased: zero on average, and below it half of the time
    assert min(same) < 0


def test_a_kernel_distance_needs_pairs():
    one, two = normal(1, 3, seed=1), normal(2, 3, seed=2)
    for x, y in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="needs at least 2 of each"):
            kernel_distance(x, y, polynomial, unbiased=True)
    assert kernel_distance(one, one, gaussian, unbiased=False) == 0
    with pytest.raises(ValueError, match="of 0 and 1 features: needs at least 1 of each"):
        kernel_distance(one[:0], one, gaussian, unbiased=False)


def test_cmmd_is_its_definition():
    """1000 x the biased MMD^2 of unit features under exp(-|u - v|^2 / 200), written out."""
    u, v = (torch.nn.functional.normalize(normal(n, 16, seed=n) + shift, dim=1) for n, shift in ((30, 0), (40, 0.5)))

    def k(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 200).mean()

    expected = float(1000 * (k(u, u) + k(v, v) - 2 * k(u, v)))
    ours = 1000 * kernel_distance(4 * u, 4 * v, gaussian, unbiased=False)  # distances take unit features times sqrt(d)
    assert ours == pytest.approx(expected, abs=1e-9) and expected > 1


@pytest.mark.parametrize("unbiased", [True, False])
def test_blocks_left_out_of_a_kernels_sums_are_rows_left_out(monkeypatch, unbiased):
    monkeypatch.setattr(distances, "CHUNK", 7)
    x, y = normal(20, 3, seed=1), normal(25, 3, seed=2) + 0.5
    bx, by = torch.arange(20) % 4, torch.arange(25) % 3
    pairs = ((x, x, bx, bx), (x, y, bx, by), (y, y, by, by))
    sums = [distances.block_sums(a, b, polynomial, i, j) for a, b, i, j in pairs]
    diagonals = [distances.diagonal_sums(z, polynomial, b) for z, b in ((x, bx), (y, by))]
    whole = distances.KernelSums(*sums, *diagonals, bx.bincount().double(), by.bincount().double())
    left_x, left_y = torch.tensor([1.0, 0, 1, 1]).double(), torch.tensor([1.0, 1, 0]).double()
    expected = kernel_distance(x[bx != 1], y[by != 2], polynomial, unbiased=unbiased)
    assert distances.mmd(whole, left_x, left_y, unbiased=unbiased) == pytest.approx(expected, abs=1e-12)


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


def test_balls_are_found_by_parts_of_the_centres(monkeypatch):
    """As of the whole matrix of distances, of which no more than a part is held; a part may hold fewer centres than k."""
    points, centres, block = normal(40, 6, seed=1), normal(50, 6, seed=2), torch.arange(50) % 3
    between, own = distances.euclidean(points, centres), distances.euclidean(centres, centres)
    whole, held = distances.euclidean, []
    monkeypatch.setattr(distances, "euclidean", lambda a, b: held.append(len(a) * len(b)) or whole(a, b))
    for size, k in ((7, 3), (7, 9), (3, 5), (1000, 3)):
        monkeypatch.setattr(distances, "CHUNK", size)
        radius = distances.radii(centres, k)
        torch.testing.assert_close(radius, own.kthvalue(k + 1, dim=1).values, rtol=0, atol=1e-9)
        inside = between <= radius
        expected = torch.stack([inside[:, block == g].any(1) for g in range(3)], 1)
        assert torch.equal(distances.covering(points, centres, radius, block), expected) and 0 < expected.sum() < expected.numel()
        assert max(held) <= size**2
        held.clear()


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


def test_diversity_refuses_features_without_direction():
    with pytest.raises(ValueError, match="2 of 4 features are all zero"):
        diversity(torch.cat([normal(2, 2), torch.zeros(2, 2)]), torch.tensor([0, 0, 1, 1]))


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


def test_a_percentile_interval_leaves_as_much_out_at_either_end():
    """Of a statistic that is each of a thousand numbers alike."""
    for level in (0.95, 0.5):
        low, high = bootstrap(lambda index: float(index[0]), 1000, draws=1000, seed=0, level=level)
        assert abs(low - 500 * (1 - level)) < 45 * (1 - level) ** 0.5 and abs(high - 500 * (1 + level)) < 45 * (1 - level) ** 0.5


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


# Jackknife


def test_the_jackknife_of_a_mean_is_its_t_interval():
    x = normal(24)
    without = [float(torch.cat([x[:i], x[i + 1 :]]).mean()) for i in range(24)]
    low, high = jackknife(float(x.mean()), without)
    half = scipy.stats.t.ppf(0.975, 23) * float(x.std()) / 24**0.5
    assert (low, high) == pytest.approx((float(x.mean()) - half, float(x.mean()) + half), abs=1e-12)
    with pytest.raises(ValueError, match="at least two groups"):
        jackknife(1.0, [1.0])
