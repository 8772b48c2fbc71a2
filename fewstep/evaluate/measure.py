"""Every number of a sample with its interval. What is small is resampled in memory; what is large stays on disk and is jackknifed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.evaluate.distances import (
    CMMD_SCALE,
    FeatureSet,
    Gaussian,
    KernelSums,
    Matrix,
    Moments,
    block_sums,
    bootstrap,
    check_finite,
    chunks,
    covering,
    frechet_distance,
    gaussian,
    jackknife,
    mmd,
    moments,
    polynomial,
    radii,
    spread,
)
from fewstep.evaluate.features import Extractor
from fewstep.rewards.clip import CLIPScore

Measured = dict[str, dict[str, float]]  # metric -> value, low, high; and masked, the pictures that a mean misses, where it misses any
Observed = Mapping[str, Matrix]

DRAWS, LEVEL = 200, 0.95  # of every bootstrap interval
BLOCKS = 20  # groups of prompts, at random, that a jackknife leaves out in turn
SMALL = 2**20  # numbers of a sample's features, N d, up to which distances are resampled in memory
NEIGHBOURS = 3  # k of precision and recall, unless the data hold several copies of each picture
TEXTS = 256  # prompts encoded together

# kernel distance -> kernel, whether pairs of a picture with itself are left out, what it is multiplied by
KERNELS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, float]] = {
    "kid": (polynomial, True, 1.0),
    "cmmd": (gaussian, False, CMMD_SCALE),
}


# Names

DISTANCES = ("fid", "kid", "patch_fid", "fd_clip", "cmmd")
OTHERS = ("utility", "precision", "recall", "diversity", "network_evaluations", "seconds_per_image")
SHUFFLED = "_over_shuffled"


def distance_names(e: Extractor) -> list[str]:
    """Of the numbers that an extractor's features give, to real pictures and to the teacher."""
    return [f"{kind}_{what}" for what in ("data", "teacher") for kind in (e.frechet, e.kernel) if kind]


def is_distance(name: str) -> bool:
    """Whether a number of this name is a distance of features, to real pictures or to the teacher."""
    return name.startswith(("fd_", *DISTANCES)) and name.endswith(("_data", "_teacher"))


def is_reserved(name: str) -> bool:
    """Whether a judge of this name would be taken for another number of a report."""
    return name in OTHERS or is_distance(name) or name.endswith(SHUFFLED)


def told_apart(extractors: Sequence[Extractor]) -> list[Extractor]:
    """The extractors, where a later one's distances would have an earlier one's name, with its own name in theirs: `fd_clip.NAME`."""
    found: list[Extractor] = []
    for e in extractors:
        taken = {kind for other in found for kind in (other.frechet, other.kernel) if kind}
        frechet, kernel = (f"{kind}.{e.name}" if kind in taken else kind for kind in (e.frechet, e.kernel))
        found.append(e._replace(frechet=frechet, kernel=kernel))
    return found


def check_names(extractors: Sequence[Extractor], scorers: Iterable[str], judges: Iterable[str], *, shared: bool) -> None:
    """Raise ValueError when two numbers of a report, or the features of two networks, would have one name.

    shared: the first extractor is a scorer, and its features have the scorer's name.
    """
    features = [*scorers, *(e.name for e in extractors[1 if shared else 0 :])]
    numbers = [
        *OTHERS,
        *(name for e in extractors for name in distance_names(e)),
        *(n for name in scorers for n in (name, name + SHUFFLED)),
    ]
    twice = [name for names in (features, [*numbers, *judges]) for name, n in Counter(names).items() if n > 1]
    for name in [*twice, *filter(is_reserved, judges)]:
        raise ValueError(f"{name!r} would name two things of one report: give the judge, scorer or extractor another name")


def real_pictures(n: int) -> str:
    return f"{n} real picture{'s' if n != 1 else ''}"


def text_features(scorer: CLIPScore, prompts: Sequence[str]) -> Tensor:
    """Unit features of all prompts, (P, d) float64 on the CPU, some at a time."""
    parts = [list(prompts[i : i + TEXTS]) for i in range(0, len(prompts), TEXTS)]
    return torch.cat([scorer.text_features(part).cpu() for part in parts]).double()


def caption_scores(features: Matrix, scorer: CLIPScore, prompts: Sequence[str], group: Tensor) -> tuple[Tensor, Tensor]:
    """Score of each picture with its own prompt, and that score minus the mean over all other prompts, each (N,) float64.

    The mean is the expectation of a shuffle that never hands a picture its own caption back, without the shuffle's noise.
    features (N, d), unit; group (N,): the number of each picture's prompt. A prompt that comes again is no other prompt.
    """
    text, times = text_features(scorer, prompts), Counter(prompts)
    same = torch.tensor([times[prompt] for prompt in prompts], dtype=torch.float64)[group]
    whole = text.sum(0)  # the sum of the scores with all prompts is one product
    own, every = [], []
    for first, rows in chunks(features):
        rows = rows.double()
        own.append((rows * text[group[first : first + len(rows)]]).sum(1))
        every.append(rows @ whole)
    own, every = scorer.scale * torch.cat(own), scorer.scale * torch.cat(every)
    return own, own - (every - same * own) / (len(prompts) - same)


def blocks_of(prompts: int, seed: int) -> Tensor:
    """A block for each prompt, (P,) int64, at random and nearly equal in size: published sets are sorted by subject."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(prompts, generator=generator) % min(BLOCKS, prompts)


@dataclass
class Measurement:
    """A sample's metrics with their intervals, as they are found, and why others have no number.

    Prompts are resampled, each with all its pictures.
    """

    rows: Tensor  # (P, G): the numbers of each prompt's pictures
    draws: int
    seed: int
    metrics: Measured = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # metric -> what the sample lacks for it
    singles: dict[str, Tensor] = field(default_factory=dict)  # what each metric that is a mean is the mean of, (P, G) or (P, 1) float64

    def put(self, name: str, found: dict[str, float]) -> None:
        """Raises ValueError for a name that another number has."""
        if name in self.metrics:
            raise ValueError(f"{name!r} names two numbers of one report: give the judge, scorer or extractor another name")
        self.metrics[name] = found

    def add(
        self, name: str, statistic: Callable[[Tensor], float], *, centre: bool = False, bounds: tuple[float, float] = (-np.inf, np.inf)
    ) -> None:
        """A statistic of prompts, given by their numbers (n,); centre: as of `bootstrap`; bounds: of the interval."""
        prompts = len(self.rows)
        ends = bootstrap(statistic, prompts, draws=self.draws, seed=self.seed, level=LEVEL, centre=centre)
        low, high = np.clip(ends, *bounds)
        self.put(name, {"value": statistic(torch.arange(prompts)), "low": float(low), "high": float(high)})

    def add_mean(self, name: str, values: Tensor) -> None:
        """Of values (N,), or (P,) in the order of the prompts."""
        values = values.double()
        self.singles[name] = values[self.rows] if len(values) == self.rows.numel() else values[:, None]
        self.put(name, mean_of(self.singles[name], self.draws, self.seed))

    def add_mean_of_scores(self, name: str, scores: Tensor) -> None:
        """Of scores (N,), not finite where a picture got none."""
        if has_mean(scores[self.rows]):
            self.add_mean(name, scores)
        else:
            self.left_out[name] = f"{int((~torch.isfinite(scores)).sum())} of {len(scores)} pictures got no score"


def measure(
    observed: Observed,
    prompts: Sequence[str],
    images_per_prompt: int,
    scorers: Mapping[str, CLIPScore],
    *,
    extractors: Sequence[Extractor] = (),
    data: Mapping[str, FeatureSet] | None = None,
    teacher: Mapping[str, FeatureSet] | None = None,
    neighbours: int = NEIGHBOURS,
    draws: int = DRAWS,
    seed: int = 0,
    repeats: bool = False,
    device: str | torch.device = "cpu",
) -> Measurement:
    """Every metric of a sample with its interval.

    observed: what `observe` saw of N pictures, those of one prompt side by side, prompts in order; repeats: `prompts` need not differ, as
    in published sets; extractors: whose features are compared, the first of which precision, recall and diversity use; data, teacher: by
    extractor, features (M, d) of real pictures and (N, d) of the teacher's of the same prompts in the same order, as distances take them.
    Without them the metrics that need them are left out. What belongs to them alone is made once, for all samples that are measured with
    the same ones. device: where all pairs of pictures are looked at.

    Prompts are resampled, each with all its pictures, the teacher's too; data are held fixed. Raises ValueError for repeated
    prompts, not more pictures than dimensions, and non-finite features.
    """
    if (len(set(prompts)) != len(prompts) and not repeats) or len(set(prompts)) < 2:
        raise ValueError(f"at least two prompts are needed, all different; got {len(set(prompts))} different of {len(prompts)}")
    rows = torch.arange(len(prompts) * images_per_prompt).view(len(prompts), images_per_prompt)
    found = Measurement(rows, draws, seed)
    for e in extractors:
        others = {what: sets[e.name] for what, sets in (("data", data), ("teacher", teacher)) if sets and e.name in sets}
        if others:
            mine = sample_set(e, observed[f"features/{e.name}"])
        for what, theirs in others.items():
            distances_of(found, e, mine, theirs, what, device=device)
    group = torch.arange(len(prompts)).repeat_interleave(images_per_prompt)
    for name, scorer in scorers.items():
        own, above = caption_scores(observed[f"features/{name}"], scorer, prompts, group)
        found.add_mean_of_scores(name, own)
        found.add_mean_of_scores(name + SHUFFLED, above)
    for name in sorted(observed):
        kind, _, judge = name.partition("/")
        if kind in ("score", "utility"):
            found.add_mean_of_scores(judge or kind, observed[name][:])
    for e in extractors[:1]:
        features = observed[f"features/{e.name}"]
        if data and e.name in data:
            precision_and_recall(found, e, features, data[e.name], neighbours, device=device)
        diversity_of(found, e, features)
    return found


def diversity_of(found: Measurement, e: Extractor, features: Matrix) -> None:
    """Mean of 1 - cosine of the features (N, d) within a prompt, some prompts at a time."""
    check_finite(features, f"generated {e.name!r}")
    zero = sum(int((~part.any(1)).sum()) for _, part in chunks(features))
    each = found.rows.shape[1]
    if zero:
        found.left_out["diversity"] = f"{zero} of {len(features)} pictures have features that are all zero, which have no angle to others"
    elif each > 1:
        size = max(1, SMALL // features.shape[1] // each) * each
        parts = [features[first : first + size] for first in range(0, len(features), size)]
        found.add_mean("diversity", torch.cat([spread(part, torch.arange(len(part)) // each) for part in parts]))
    else:
        found.left_out["diversity"] = "needs at least two pictures of every prompt"


def mean_of(values: Tensor, draws: int, seed: int) -> dict[str, float]:
    """Mean of values (P, G) with its interval: prompts are resampled, each with all its pictures. A value that is not finite is of a
    picture that got none: it is no part of the mean, and `masked` counts it. Raises ValueError for values of fewer than two prompts."""
    there = torch.isfinite(values)
    some = there.any(1)  # prompts without any value are not resampled
    sums, counts = values.where(there, 0).sum(1)[some], there.sum(1)[some]

    def mean(index: Tensor) -> float:
        return float(sums[index].sum() / counts[index].sum())

    low, high = bootstrap(mean, len(sums), draws=draws, seed=seed, level=LEVEL)
    found = {"value": mean(torch.arange(len(sums))), "low": low, "high": high}
    return found if bool(there.all()) else found | {"masked": int((~there).sum())}


def has_mean(values: Tensor) -> bool:
    """Whether values (P, G), not finite where there is none, are of two prompts at least."""
    return int(torch.isfinite(values).any(1).sum()) > 1


def paired(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, draws: int = DRAWS, seed: int = 0) -> Measured:
    """Mean difference mine - theirs, picture by picture, of every metric that is a mean, with its interval.

    mine, theirs: the `singles` of two samples of the same prompts, drawn from the same noise. What pictures of one prompt and noise
    have in common, good or bad, is no part of the difference, whose interval is so the narrower. A pair needs both values.
    """
    differences = {name: values - theirs[name] for name, values in mine.items() if name in theirs}
    return {name: mean_of(values, draws, seed) for name, values in differences.items() if has_mean(values)}


def for_distances(e: Extractor, features: Matrix, *, at_once: bool) -> Matrix:
    """A sample's features (N, d), as they were kept, as distances take them: read `at_once`, or part by part where they are on disk. In
    memory they are float64; what is read from disk becomes so part by part."""
    kept = features[:] if at_once else features
    return e.for_distances(kept.double() if isinstance(kept, Tensor) else kept)


def sample_set(e: Extractor, features: Matrix) -> FeatureSet:
    """A sample's features (N, d), as they were kept, for its distances. Raises ValueError unless they are finite."""
    check_finite(features, f"generated {e.name!r}")
    return FeatureSet(for_distances(e, features, at_once=in_memory(features)))


def in_memory(features: Matrix) -> bool:
    """Whether distances of a sample with these features (N, d) are resampled in memory."""
    n, d = features.shape
    return n * d <= SMALL


def distances_of(found: Measurement, e: Extractor, mine: FeatureSet, theirs: FeatureSet, what: str, *, device: str | torch.device) -> None:
    """The Frechet and the kernel distance of a sample (N, d) to another set.

    what: "data", which are held fixed, or "teacher", of which the same prompts are drawn or left out: which prompts were drawn is no
    difference.
    """
    (n, d), (m, width) = mine.features.shape, theirs.features.shape
    rows, seed, left_out = found.rows, found.seed, found.left_out
    paired = what == "teacher"
    if paired and m != n:
        raise ValueError(f"the teacher's sample must be of the same prompts: it has {m} pictures, not {n}")
    if width != d:
        raise ValueError(f"{e.name!r} has {d} features of a generated picture and {width} of one of the {what}'s; it needs one width")
    theirs.check(f"{'teacher' if paired else 'real'} {e.name!r}")
    name = f"{e.frechet}_{what}"
    if min(n, m) <= d:
        if not e.kernel and e.frechet == "fd_clip":  # a scorer's alone was refused before anything was drawn
            raise ValueError(f"{min(n, m)} features of {d} dimensions: their covariance is singular; use more than {d} pictures")
        least = f"{n} pictures" if paired or n <= m else real_pictures(m)
        left_out[name] = f"{least}, but the covariance of {d} features needs more than {d}"
    elif in_memory(mine.features):
        if paired:
            others = theirs.features[:].double()

            def distance(index: Tensor) -> float:
                taken = rows[index].flatten()
                return frechet_distance(*moments(others[taken]), *moments(mine.features[taken]))
        else:
            fixed = theirs.gaussian(at_once=True)

            def distance(index: Tensor) -> float:
                return fixed.distance(*moments(mine.features[rows[index].flatten()]))

        found.add(name, distance, centre=True, bounds=(0, np.inf))
    else:
        found.put(name, jackknifed_frechet(mine, theirs, rows, paired=paired, seed=seed))
    if e.kernel:
        kernel, name = e.kernel.partition(".")[0], f"{e.kernel}_{what}"
        unbiased = KERNELS[kernel][1]
        if unbiased and m < 2:
            left_out[name] = f"{real_pictures(m)}, but it takes the mean over pairs of different ones"
        elif unbiased and n < 3:
            left_out[name] = f"{n} pictures, but its interval leaves a prompt out, and the mean over pairs needs two pictures of the others"
        else:
            found.put(name, jackknifed_kernel(kernel, mine, theirs, rows, paired=paired, seed=seed, device=device))


def jackknifed_frechet(mine: FeatureSet, theirs: FeatureSet, rows: Tensor, *, paired: bool, seed: int) -> dict[str, float]:
    """Frechet distance of features on disk, by running moments; blocks of prompts are left out by subtracting theirs."""
    own, fixed = mine.moments(), theirs.gaussian(at_once=False)
    block = blocks_of(len(rows), seed)
    without = []
    for g in range(int(block.max()) + 1):
        taken, reference = rows[block == g].flatten(), fixed
        if paired:
            other = theirs.moments()
            reference = Gaussian.of(*other.without(of_rows(theirs.features, taken, other.about)).finish())
        without.append(reference.distance(*own.without(of_rows(mine.features, taken, own.about)).finish()))
    value = fixed.distance(*own.finish())
    low, high = jackknife(value, without, level=LEVEL)
    return {"value": value, "low": max(0.0, low), "high": high}


def of_rows(features: Matrix, taken: Tensor, about: Tensor) -> Moments:
    found = Moments(about)
    for part in taken.split(1024):
        found.add(features[part])
    return found


def jackknifed_kernel(
    kernel: str, mine: FeatureSet, theirs: FeatureSet, rows: Tensor, *, paired: bool, seed: int, device: str | torch.device
) -> dict[str, float]:
    """Kernel distance over all pairs of pictures; blocks of prompts are left out of the sums."""
    function, unbiased, scale = KERNELS[kernel]
    block = blocks_of(len(rows), seed)
    of_mine = block.repeat_interleave(rows.shape[1])
    of_theirs = of_mine if paired else torch.zeros(len(theirs.features), dtype=torch.long)
    xy = block_sums(mine.features, theirs.features, function, of_mine, of_theirs, device=device)
    (xx, diagonal_x), (yy, diagonal_y) = (
        side.kernel_sums(function, of, device=device) for side, of in ((mine, of_mine), (theirs, of_theirs))
    )
    sums = KernelSums(xx, xy, yy, diagonal_x, diagonal_y, of_mine.bincount().double(), of_theirs.bincount().double())
    every, fixed = torch.ones(len(sums.n), dtype=torch.float64), torch.ones(len(sums.m), dtype=torch.float64)
    value = scale * mmd(sums, every, fixed, unbiased=unbiased)
    without = []
    for g in range(len(sums.n)):
        left = every.clone()
        left[g] = 0
        without.append(scale * mmd(sums, left, left if paired else fixed, unbiased=unbiased))
    low, high = jackknife(value, without, level=LEVEL)
    return {"value": value, "low": low if unbiased else max(0.0, low), "high": high}  # with the diagonals it is a squared norm


def precision_and_recall(
    found: Measurement, e: Extractor, features: Matrix, data: FeatureSet, neighbours: int, *, device: str | torch.device
) -> None:
    """Share of the pictures inside the data's balls, and of the data inside the pictures'; the balls keep their radii when resampled."""
    (n, d), rows, theirs = features.shape, found.rows, data.features
    m = len(theirs)
    small = recall_in_memory(n, d, len(rows), m)
    mine = for_distances(e, features, at_once=small)
    one = torch.zeros(m, dtype=torch.long)
    too_few = f"but a ball reaches to neighbour {neighbours} of its picture and needs more than {neighbours}"
    if m > neighbours:
        found.add_mean("precision", covering(mine, theirs, data.radii(neighbours, device=device), one, device=device)[:, 0])
    else:
        found.left_out["precision"] = f"{real_pictures(m)}, {too_few}"
    if n <= neighbours:
        found.left_out["recall"] = f"{n} pictures, {too_few}"
        return
    block = (torch.arange(len(rows)) if small else blocks_of(len(rows), found.seed)).repeat_interleave(rows.shape[1])
    held = covering(theirs, mine, radii(mine, neighbours, device=device), block, device=device)  # (M, prompts or blocks)

    def recall(index: Tensor) -> float:
        return float(held[:, index].any(1).double().mean())

    if small:
        found.add("recall", recall, centre=True, bounds=(0, 1))
        return
    groups = range(held.shape[1])
    without = [recall(torch.tensor([other for other in groups if other != g])) for g in groups]
    value = recall(torch.tensor(list(groups)))
    low, high = np.clip(jackknife(value, without, level=LEVEL), 0, 1)
    found.put("recall", {"value": value, "low": float(low), "high": float(high)})


def recall_in_memory(n: int, d: int, prompts: int, real: int) -> bool:
    """Whether recall is resampled: n pictures of d features, and which of `prompts` holds each of the real ones."""
    return n * d <= SMALL and prompts * real <= 32 * SMALL


def jackknifed(n: int, prompts: int, real: int, extractors: Sequence[Extractor], metrics: Sequence[str]) -> list[str]:
    """Which of a report's metrics have jackknife intervals, for samples of n pictures of `prompts`, and `real` pictures."""
    found = []
    for e, what in itertools.product(extractors, ("data", "teacher")):
        found += [f"{e.kernel}_{what}"] if e.kernel else []
        found += [f"{e.frechet}_{what}"] if n * e.width > SMALL else []
    if extractors and not recall_in_memory(n, extractors[0].width, prompts, real):
        found.append("recall")
    return [name for name in metrics if name in found]
