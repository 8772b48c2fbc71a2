"""Distances between sets of pictures, given as features (N, d), and bootstrap intervals. Pure; float64 inside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def checked(features: Tensor, name: str) -> Tensor:
    """`features` as float64. Raises ValueError unless it is (N, d) and finite."""
    if features.ndim != 2:
        raise ValueError(f"{name} features must be (N, d), got {tuple(features.shape)}")
    bad = int((~torch.isfinite(features)).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(features)} {name} features hold NaN or inf")
    return features.double()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (N, d)."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def root(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix (d, d); eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    Means (d,), covariances (d, d). cov_a cov_b has the eigenvalues of the symmetric cov_a^1/2 cov_b cov_a^1/2, whose
    square roots are real and exist when either covariance is singular.
    """
    mean_a, cov_a, mean_b, cov_b = (x.double() for x in (mean_a, cov_a, mean_b, cov_b))
    half = root(cov_a)
    product = half @ cov_b @ half
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets, (N, d) and (M, d). Biased upwards, of order 1/N + 1/M: compare
    values at equal N and M only. Raises ValueError when a set has no more than d features or holds NaN or inf."""
    fitted = []
    for features, name in ((features_a, "first"), (features_b, "second")):
        features = checked(features, name)
        n, d = features.shape
        if n <= d:
            raise ValueError(f"the {name} set has {n} features of {d} dimensions: its covariance is singular; use more than {d} pictures")
        fitted += moments(features)
    if len(fitted[0]) != len(fitted[2]):
        raise ValueError(f"the two sets differ in dimension: {len(fitted[0])} and {len(fitted[2])}")
    return frechet_distance(*fitted)


def covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Which centre's ball holds which point, (P, C) bool: a ball's radius is the distance to its centre's k-th nearest other centre.

    Raises ValueError when there are not more than k centres.
    """
    if len(centres) <= k:
        raise ValueError(f"{len(centres)} features have no {k}-th nearest neighbour; use more than {k}")

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # exact for points that coincide

    radius = distance(centres, centres).kthvalue(k + 1, dim=1).values  # the first is the centre itself
    return distance(points, centres) <= radius


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of (N, d) against a reference (M, d).

    precision: share of generated features inside a k-nearest-neighbour ball of the reference; recall: the reverse.
    """
    reference, generated = checked(reference, "reference"), checked(generated, "generated")
    inside, outside = covered(generated, reference, k), covered(reference, generated, k)
    return float(inside.any(1).double().mean()), float(outside.any(1).double().mean())


def spread(features: Tensor, group: Tensor) -> Tensor:
    """Mean of 1 - cosine over all pairs within each group: features (N, d), group (N,) int64 -> (P,), groups in ascending order.

    Raises ValueError when a group has only one member.
    """
    unit = torch.nn.functional.normalize(checked(features, "generated"), dim=1)
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    if bool((count < 2).any()):
        raise ValueError("diversity within a prompt needs at least two pictures of every prompt")
    total = torch.zeros(len(count), unit.shape[1], dtype=unit.dtype).index_add_(0, index, unit)
    # |sum u|^2 holds n ones and each pair's cosine twice
    return 1 - (total.square().sum(1) - count) / (count * (count - 1))


def diversity(features: Tensor, group: Tensor) -> float:
    """Mean over groups (prompts) of the mean pairwise 1 - cosine within a group. features (N, d), group (N,) int64."""
    return float(spread(features, group).mean())


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, draws: int, seed: int, level: float = 0.95, centre: bool = False
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(index)`, index (n,) int64 drawn with replacement from range(n).

    n counts the units that are independent: pictures of one prompt are not, so resample prompts and let the statistic
    take all pictures of each (cluster bootstrap). One seed gives every statistic the same resamples: intervals are paired.
    centre: move the interval by the bias of resampling, so that it surrounds the value on all n. For statistics that repeated
    units push one way (Frechet distance up, recall down): the interval then belongs to the statistic at this very n.
    """
    if n < 2:
        raise ValueError(f"an interval needs at least two independent units, got {n}")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(n, (draws, n), generator=generator)
    values = np.array([statistic(row) for row in index])
    if centre:
        values += statistic(torch.arange(n)) - values.mean()
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
