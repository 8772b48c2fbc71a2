"""What the cells say together: means, intervals, paired differences, where a budget settled, drift, the fronts' hypervolumes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from fewstep import world
from fewstep.compare.cells import Cells
from fewstep.compare.rows import BY_NAME, DISTANCES, FROM_ONE, MANY_STEPS_ROW, METRICS, PARETO, TEACHER_ROWS, Row
from fewstep.weights import Adaptive, mean_rate


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half width of its t-interval); NaN half width for a single value."""
    import numpy as np
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


MARKS_OF_DRIFT = 6


class Drift(NamedTuple):
    """Whether a distance climbs again at the end of a run."""

    minimum: float  # of the running mean over three marks
    last_third: float  # mean over the last third of the marks
    standard_error: float  # of that mean, over its marks


def drift(along: list[float]) -> Drift:
    """How the last third of the marks compares with the smoothed minimum. Raises ValueError with fewer than MARKS_OF_DRIFT."""
    import numpy as np

    if len(along) < MARKS_OF_DRIFT:
        raise ValueError(f"drift needs at least {MARKS_OF_DRIFT} measurements, two in the last third; got {len(along)}")
    smooth, last = np.convolve(along, np.ones(3) / 3, "valid"), along[-(len(along) // 3) :]
    return Drift(float(smooth.min()), float(np.mean(last)), float(np.std(last, ddof=1) / len(last) ** 0.5))


class Settled(NamedTuple):
    """The last quarter of a run with an adaptive weight."""

    kl_over_budget: float  # mean; 1: the budget is held
    weight: float  # mean of the total weight
    at_cap: float  # share of the updates with the weight at its cap


def settled(trace: list[dict[str, float]]) -> Settled:
    """Where the fidelity budget (7) and its weight stood over the last quarter of the updates that evaluated R_dm after the warm-up.

    The weight follows running means. Here the KL is the scores of that quarter themselves plus the running lag: the running mean of the
    scores is some twenty updates old, and where the KL still rises it says where it was before the quarter began.
    """
    heard, mean, count = [], 0.0, 0
    for logs in trace:
        if "weights/kl" not in logs:
            continue
        kl = -logs["dm/score"]
        mean, count = mean + mean_rate(count, Adaptive.decay) * (kl - mean), count + 1
        if "weights/budget" in logs:
            lag = logs["weights/kl"] - mean
            heard.append(((kl + lag) / logs["weights/budget"], logs["weights/weight"], logs["weights/weight_at_cap"]))
    if not heard:
        raise ValueError("no update came after the warm-up, so that no budget was set")
    last = heard[-max(len(heard) // 4, 1) :]
    return Settled(*(sum(column) / len(last) for column in zip(*last, strict=True)))


def summarise(cells: Cells) -> list[dict[str, Any]]:
    """Rows of the table in its order: mean and half width of each metric over seeds, and paired differences to the row's baseline."""
    out = []
    for name, row in BY_NAME.items():
        own = {seed: cell for (of, seed), cell in sorted(cells.items()) if of == name}
        if not own:
            continue
        baseline = row.baseline if isinstance(row, Row) else None
        other = {seed: cell for (of, seed), cell in cells.items() if of == baseline}
        of_seeds, first = list(own.values()), next(iter(own.values()))
        metrics = {key: interval([cell["metrics"][key] for cell in of_seeds]) for key in first["metrics"]}
        entry: dict[str, Any] = {"row": name, "seeds": list(own), "metrics": metrics, "baseline": baseline, "paired": {}}
        for what in ("machine", "commit"):
            entry[f"{what}s"] = dict(Counter(cell[what] for cell in of_seeds))
        if "updates" in first:
            entry["updates"] = interval([cell["updates"] for cell in of_seeds])[0]
            entry["training_seconds"] = interval([cell["training_seconds"] for cell in of_seeds])[0]
            entry["flops"] = interval([float(sum(cell["flops"].values())) for cell in of_seeds])[0]
        if "judge" in first and all(cell["judge"]["budget"] for cell in of_seeds):  # else a training ended within its warm-up
            stood = [settled(cell["trace"])._asdict() for cell in of_seeds]
            entry["settled"] = {key: interval([each[key] for each in stood]) for key in Settled._fields}
            judges = [cell["judge"] for cell in of_seeds]
            entry["settled"]["fresh_over_budget"] = interval([judge["fresh"] / judge["budget"] for judge in judges])
            entry["settled"]["gap_over_budget"] = interval([judge["gap"] / judge["budget"] for judge in judges])
            entry["settled"]["judge_updates"] = interval([judge["updates"] for judge in judges])
            # those of before began as the teacher, and at a constant rate, where their KL scatters, noise stopped them
            entry["settled"]["judges_converged"] = interval(
                [float(judge["converged"] and judge["kls"][0] == judge["own"]) for judge in judges]
            )
            entry["settled"]["larger_over_budget"] = interval([max(judge["own"], judge["fresh"]) / judge["budget"] for judge in judges])
        if len(first.get("along", ())) >= MARKS_OF_DRIFT:
            entry["drift"] = {
                key: {seed: drift([at[key] for at in cell["along"]])._asdict() for seed, cell in own.items()} for key in DISTANCES
            }
        shared = [seed for seed in own if seed in other]
        if shared:
            entry["paired"] = {
                key: interval([own[seed]["metrics"][key] - other[seed]["metrics"][key] for seed in shared]) for key in METRICS
            }
        out.append(entry)
    return out


def hypervolume(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area dominated by points (lower, higher) is better, inside the reference (FD, preference)."""
    inside = sorted((x, y) for x, y in points if x < reference[0] and y > reference[1])
    area, height = 0.0, reference[1]
    for i, (x, y) in enumerate(inside):
        height = max(height, y)
        end = inside[i + 1][0] if i + 1 < len(inside) else reference[0]
        area += (end - x) * (height - reference[1])
    return area


def method_of(row: str) -> str:
    """Of a front's row: its name without the weight."""
    return row.rpartition(" ")[0]


METHODS = tuple(dict.fromkeys(method_of(row.name) for row in (*PARETO, *FROM_ONE)))  # a front each
POINT = ("fd_clip_teacher", "preference")


def corner(summary: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Where hypervolumes begin: the best few-step teacher's distance and the many-step teacher's preference, on average; None while a
    teacher's row is missing."""
    by_row = {entry["row"]: entry["metrics"] for entry in summary}
    guided = {name: row for name, row in TEACHER_ROWS.items() if row.guidance == world.TEACHER_GUIDANCE}
    if not guided.keys() <= by_row.keys():
        return None
    few = [by_row[name]["fd_clip_teacher"][0] for name, row in guided.items() if row.solver]
    return min(few), by_row[MANY_STEPS_ROW]["preference"][0]


def fronts(summary: list[dict[str, Any]]) -> dict[str, float]:
    """Hypervolume of each front's mean points (FD to teacher, preference); empty without fronts' rows and without a corner."""
    points: dict[str, list[Any]] = {}
    for entry in summary:
        if (method := method_of(entry["row"])) in METHODS:
            points.setdefault(method, []).append(tuple(entry["metrics"][key][0] for key in POINT))
    reference = corner(summary)
    return {method: hypervolume(at, reference) for method, at in points.items()} if reference else {}


class Pair(NamedTuple):
    """Two methods' fronts on the seeds that have all weights of both."""

    areas: dict[int, tuple[float, float]]  # hypervolumes of GNDMR and of DMDR, by seed
    difference: tuple[float, float]  # GNDMR's minus DMDR's: mean and half width
    ratio: float | None  # of the means; None where DMDR's is 0


def paired_fronts(cells: Cells, summary: list[dict[str, Any]]) -> dict[str, Pair]:
    """GNDMR's fronts beside DMDR's, seed by seed, by GNDMR's method; of those that begin from one student only seeds where all did."""
    reference, out = corner(summary), {}
    if not reference:
        return {}
    for method in (name for name in METHODS if name.startswith("GNDMR")):
        pair = method, method.replace("GNDMR", "DMDR")
        rows = [[name for name in BY_NAME if method_of(name) == of] for of in pair]
        areas = {}
        for seed in sorted({seed for _, seed in cells}):
            of_seed = [[cells.get((name, seed)) for name in names] for names in rows]
            every = [cell for of_method in of_seed for cell in of_method]
            if None in every or len({cell.get("begun") for cell in every}) > 1:
                continue
            a, b = (hypervolume([tuple(cell["metrics"][key] for key in POINT) for cell in of], reference) for of in of_seed)
            areas[seed] = a, b
        if areas:
            of_each = [sum(column) / len(areas) for column in zip(*areas.values(), strict=True)]
            ratio = of_each[0] / of_each[1] if of_each[1] else None
            out[method] = Pair(areas, interval([a - b for a, b in areas.values()]), ratio)
    return out
