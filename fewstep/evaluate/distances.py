"""Distances between sets of pictures, given as features (N, d), and their intervals. Pure; float64 inside.

Sets too large for memory come as a `Matrix`, whose rows are read some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1024  # rows of a Matrix that are looked at together


class Matrix(Protocol):
    """(N, d), in memory (a Tensor) or on disk: rows by a slice or by their numbers, as a Tensor."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Tensor: ...


def chunks(matrix: Matrix, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, the rows) of each part of a matrix. size: rows of a part (None: CHUNK)."""
    size = size or CHUNK
    for first in range(0, len(matrix), size):
        yield first, matrix[first : first + size]


def check_finite(matrix: Matrix, name: str) -> None:
    """Raises ValueError unless a matrix is (N, d) and finite."""
    if len(matrix.shape) != 2:
        raise ValueError(f"{name} features must be (N, d), got {tuple(matrix.shape)}")
    bad = sum(int((~torch.isfinite(rows)).any(1).sum()) for _, rows in chunks(matrix))
    if bad:
        raise ValueError(f"{bad} of {len(matrix)} {name} features hold NaN or inf")


def checked(features: Tensor, name: str) -> Tensor:
    """`features` as float64. Raises ValueError unless it is (N, d) and finite."""
    check_finite(features, name)
    return features.double()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (N, d)."""
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


class Moments:
    """Mean and covariance of features that come some at a time: their number, sum and outer products, about a point near them.

    about (d,): without it the outer products of features far from zero would lose the digits that the covariance is made of.
    """

    def __init__(self, about: Tensor):
        self.about, self.n = about.double(), 0
        self.sum, self.outer = torch.zeros_like(self.about), torch.zeros(len(about), len(about), dtype=torch.float64)

    def add(self, features: Tensor) -> Moments:
        """Take in features (B, d)."""
        x = features.double() - self.about
        self.n, self.sum = self.n + len(x), self.sum + x.sum(0)
        self.outer.addmm_(x.T, x)
        return self

    def without(self, part: Moments) -> Moments:
        """The moments of those that are not in `part`, which was taken about the same point."""
        rest = Moments(self.about)
        rest.n, rest.sum, rest.outer = self.n - part.n, self.sum - part.sum, self.outer - part.outer
        return rest

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mean (d,) and unbiased covariance (d, d)."""
        mean = self.sum / self.n
        return mean + self.about, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def running_moments(features: Matrix) -> Moments:
    """Moments of a matrix, read in parts, about the mean of its first rows."""
    total = Moments(features[:CHUNK].double().mean(0))
    for _, rows in chunks(features):
        total.add(rows)
    return total


def root(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix (d, d); eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Gaussian(NamedTuple):
    """What a Frechet distance takes of its first set: many sets have their distance to one, whose root is taken once."""

    mean: Tensor  # (d,)
    trace: Tensor  # of the covariance, ()
    half: Tensor  # its square root, (d, d)

    @classmethod
    def of(cls, mean: Tensor, cov: Tensor) -> Gaussian:
        """Mean (d,), covariance (d, d)."""
        return cls(mean.double(), cov.double().trace(), root(cov.double()))

    def distance(self, mean: Tensor, cov: Tensor) -> float:
        """`frechet_distance` to the Gaussian of that mean (d,) and covariance (d, d)."""
        mean, cov = mean.double(), cov.double()
        product = self.half @ cov @ self.half
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        return max(0.0, float((self.mean - mean).square().sum() + self.trace + cov.trace() - 2 * cross))


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    Means (d,), covariances (d, d). cov_a cov_b has the eigenvalues of the symmetric cov_a^1/2 cov_b cov_a^1/2, whose
    square roots are real and exist when either covariance is singular.
    """
    return Gaussian.of(mean_a, cov_a).distance(mean_b, cov_b)


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


# Kernel distances


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (Binkowski et al., arXiv 1801.01401): (x.y / d + 1)^3. (N, d), (M, d) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel (Jayasumana et al., arXiv 2401.09603): exp(-|u - v|^2 / (2 sigma^2)) of unit features u, v.

    x, y: unit features times sqrt(d), as every distance here takes them. (N, d), (M, d) -> (N, M).
    """
    square = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-square / (2 * CMMD_SIGMA**2 * x.shape[1]))


Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelSums(NamedTuple):
    """Sums of a kernel over all pairs of rows, by the blocks that the rows belong to: any block can be left out afterwards."""

    xx: Tensor  # (G, G)
    xy: Tensor  # (G, H)
    yy: Tensor  # (H, H)
    diagonal_x: Tensor  # (G,): of rows with themselves
    diagonal_y: Tensor  # (H,)
    n: Tensor  # (G,) rows of x in each block
    m: Tensor  # (H,)


def block_sums(x: Matrix, y: Matrix, kernel: Kernel, block_x: Tensor, block_y: Tensor, *, device: str | torch.device = "cpu") -> Tensor:
    """Sum of the kernel over the pairs of each block of x with each of y, (G, H) float64. block_x (N,), block_y (M,) int64."""
    one_hot = [torch.nn.functional.one_hot(block).double().to(device) for block in (block_x, block_y)]
    total = torch.zeros(one_hot[0].shape[1], one_hot[1].shape[1], dtype=torch.float64, device=device)
    for i, rows in chunks(x):
        rows, left = rows.to(device).double(), one_hot[0][i : i + CHUNK].T
        for j, others in chunks(y):
            total += left @ kernel(rows, others.to(device).double()) @ one_hot[1][j : j + CHUNK]
    return total.cpu()


def diagonal_sums(x: Matrix, kernel: Kernel, block: Tensor) -> Tensor:
    """Sum of the kernel of each row with itself over each block, (G,) float64."""
    own = torch.cat([torch.cat([kernel(row[None], row[None])[0] for row in rows.double()]) for _, rows in chunks(x)])
    return torch.zeros(int(block.max()) + 1, dtype=torch.float64).index_add_(0, block, own)


def mmd(sums: KernelSums, keep_x: Tensor, keep_y: Tensor, *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy of the blocks that are kept. keep_x (G,), keep_y (H,) float64, 0 or 1.

    unbiased: without the pairs of a row with itself (KID); CMMD is defined with them.
    """
    n, m = keep_x @ sums.n, keep_y @ sums.m
    xx, xy, yy = keep_x @ sums.xx @ keep_x, keep_x @ sums.xy @ keep_y, keep_y @ sums.yy @ keep_y
    if unbiased:
        xx, yy = (xx - keep_x @ sums.diagonal_x) / (n * (n - 1)), (yy - keep_y @ sums.diagonal_y) / (m * (m - 1))
    else:
        xx, yy = xx / n**2, yy / m**2
    return float(xx + yy - 2 * xy / (n * m))


def kernel_distance(x: Matrix, y: Matrix, kernel: Kernel, *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy of two sets, (N, d) and (M, d), over all pairs.

    Raises ValueError for an empty set, or, where it is unbiased, a set of one: the pairs of different rows have no mean.
    """
    fewest = 2 if unbiased else 1
    if min(len(x), len(y)) < fewest:
        raise ValueError(f"the kernel distance of {len(x)} and {len(y)} features: needs at least {fewest} of each; use more pictures")
    none = [torch.zeros(len(matrix), dtype=torch.long) for matrix in (x, y)]
    pairs = [(x, x, none[0], none[0]), (x, y, *none), (y, y, none[1], none[1])]
    sums = [block_sums(a, b, kernel, i, j) for a, b, i, j in pairs]
    diagonals = [diagonal_sums(matrix, kernel, block) for matrix, block in zip((x, y), none, strict=True)]
    counts = [torch.tensor([float(len(matrix))], dtype=torch.float64) for matrix in (x, y)]
    one = torch.ones(1, dtype=torch.float64)
    return mmd(KernelSums(*sums, *diagonals, *counts), one, one, unbiased=unbiased)


# Precision, recall, diversity


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Distances (N, M) of float64 rows (N, d), (M, d); exact for points that coincide where d is at most 256.

    Wider rows go through a matrix product, twenty times as fast; points that coincide are then some 1e-7 of their length apart.
    """
    exact = a.shape[1] <= 256
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist")


def radii(centres: Matrix, k: int, *, device: str | torch.device = "cpu") -> Tensor:
    """Each centre's distance to its k-th nearest other centre, (C,). Raises ValueError when there are not more than k centres."""
    if len(centres) <= k:
        raise ValueError(f"{len(centres)} features have no {k}-th nearest neighbour; use more than {k}")
    found = []
    for _, rows in chunks(centres):
        rows = rows.to(device).double()
        nearest = torch.full((len(rows), k + 1), torch.inf, dtype=torch.float64, device=device)  # the first will be the centre itself
        for _, others in chunks(centres):
            beside = euclidean(rows, others.to(device).double())
            nearest = torch.cat([nearest, beside], 1).topk(k + 1, dim=1, largest=False).values
        found.append(nearest[:, -1].cpu())
    return torch.cat(found)


def covering(points: Matrix, centres: Matrix, radius: Tensor, block: Tensor, *, device: str | torch.device = "cpu") -> Tensor:
    """Which block has a centre whose ball holds which point, (P, G) bool. radius (C,), block (C,) int64."""
    blocks, parts = int(block.max()) + 1, []
    radius, block = radius.to(device), block.to(device)
    for _, rows in chunks(points):
        rows = rows.to(device).double()
        held = torch.zeros(len(rows), blocks, dtype=torch.bool, device=device)
        for first, others in chunks(centres):
            beside = euclidean(rows, others.to(device).double())
            point, centre = (beside <= radius[first : first + len(others)]).nonzero(as_tuple=True)
            held[point, block[first + centre]] = True
        parts.append(held.cpu())
    return torch.cat(parts)


def covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Which centre's ball holds which point, (P, C) bool: a ball's radius is the distance to its centre's k-th nearest other centre.

    Raises ValueError when there are not more than k centres.
    """
    return euclidean(points, centres) <= radii(centres, k)


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of (N, d) against a reference (M, d).

    precision: share of generated features inside a k-nearest-neighbour ball of the reference; recall: the reverse.
    """
    reference, generated = checked(reference, "reference"), checked(generated, "generated")
    inside, outside = covered(generated, reference, k), covered(reference, generated, k)
    return float(inside.any(1).double().mean()), float(outside.any(1).double().mean())


def spread(features: Tensor, group: Tensor) -> Tensor:
    """Mean of 1 - cosine over all pairs within each group: features (N, d), group (N,) int64 -> (P,), groups in ascending order.

    Raises ValueError when a group has only one member, or features are all zero: those have no cosine.
    """
    if bool((~features.any(1)).any()):
        raise ValueError(f"{int((~features.any(1)).sum())} of {len(features)} features are all zero, and have no cosine with others")
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


# A set, and what belongs to it alone


class FeatureSet:
    """Features (N, d) as distances take them, and what belongs to them alone, made when it is first asked for and then kept: every sample
    of an evaluation has its distances to the same sets."""

    def __init__(self, features: Matrix):
        self.features = features
        self.made: dict[Hashable, Any] = {}

    def once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        if what not in self.made:
            self.made[what] = make()
        return self.made[what]

    def check(self, name: str) -> None:
        """Raises ValueError as `check_finite` does."""
        self.once("finite", lambda: check_finite(self.features, name))

    def moments(self) -> Moments:
        """Running ones."""
        return self.once("moments", lambda: running_moments(self.features))

    def gaussian(self, *, at_once: bool) -> Gaussian:
        """at_once: of all features together, in memory, not of running moments; the two differ by rounding."""

        def make() -> Gaussian:
            return Gaussian.of(*(moments(self.features[:].double()) if at_once else self.moments().finish()))

        return self.once(("gaussian", at_once), make)

    def kernel_sums(self, kernel: Kernel, block: Tensor, *, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """(`block_sums` with itself, `diagonal_sums`); block (N,) int64."""

        def make() -> tuple[Tensor, Tensor]:
            sums = block_sums(self.features, self.features, kernel, block, block, device=device)
            return sums, diagonal_sums(self.features, kernel, block)

        return self.once((kernel, block.numpy().tobytes()), make)

    def radii(self, k: int, *, device: str | torch.device = "cpu") -> Tensor:
        """As the function of this name."""
        return self.once(("radii", k), lambda: radii(self.features, k, device=device))


# Intervals


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


def jackknife(value: float, without: list[float], *, level: float = 0.95) -> tuple[float, float]:
    """value +- t times the standard error of the delete-a-group jackknife. without: the statistic with each of G groups left out.

    For statistics that cost too much to resample: G evaluations instead of hundreds. Its t-quantile has G - 1 degrees of freedom.
    The bias of a statistic that depends on the number of rows is nearly the same in all G, and stays in the value.
    """
    from scipy.stats import t

    left = np.array(without)
    groups = len(left)
    if groups < 2:
        raise ValueError(f"an interval needs at least two groups, got {groups}")
    error = float(np.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum()))
    half = float(t.ppf((1 + level) / 2, groups - 1)) * error
    return value - half, value + half
