"""The comparison as a table in Markdown and as pictures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from fewstep.compare.cells import Plan
from fewstep.compare.rows import BEGUN, COSTS, DISTANCES, EVERY_ROW, MANY_STEPS_ROW, METRICS, PRICE, TEACHER_ROWS, Row
from fewstep.compare.summary import METHODS, POINT, Pair, corner, fronts, method_of
from fewstep.disk import replace
from fewstep.evaluate import drawing, tables

COMMIT = re.compile(r"^([0-9a-f]{7})[0-9a-f]{33}")  # shortened as Git does


Summary = list[dict[str, Any]]  # as `summary.summarise` returns it


def markdown(summary: Summary, pairs: dict[str, Pair], plan: Plan) -> str:
    """The table as Markdown, with what it was made with."""
    columns = [*(tables.LABELS[key].strip() for key in METRICS), *(tables.LABELS[key] for key in COSTS)]
    heads = ["", "seeds", "updates", "TFLOP", *columns, "difference to", "FD to data", "FD to teacher"]
    notes = [
        note_on_plan(plan),
        f"Made on: {made(summary, 'machines')}.",
        f"Made at these commits, in which a row and its baseline may differ: {made(summary, 'commits')}.",
        note_on_costs(summary, plan),
        *(note for entry in summary for note in (note_on_budget(entry), *notes_on_drift(entry))),
        note_on_price(summary),
        note_on_beginnings(summary, plan),
        note_on_fronts(summary),
        *(note_on_pair(method, pair) for method, pair in pairs.items()),
    ]
    return "\n\n".join([tables.markdown_table(heads, [line(entry) for entry in summary]), *filter(None, notes)]) + "\n"


def line(entry: dict[str, Any]) -> list[str]:
    """A row of the table."""
    metrics, paired = entry["metrics"], entry["paired"]
    return [
        entry["row"],
        str(len(entry["seeds"])),
        f"{entry['updates']:.0f}" if "updates" in entry else "",
        f"{entry['flops'] / 1e12:.1f}" if "flops" in entry else "",
        *(number(*metrics[key]) for key in METRICS),
        f"{metrics['network_evaluations'][0]:g}",
        number(*metrics["seconds_per_image"]),
        entry["baseline"] if paired else "",
        *(number(*paired[key]) if paired else "" for key in DISTANCES),
    ]


def note_on_plan(plan: Plan) -> str:
    n = plan.prompts * plan.images_per_prompt
    return (
        f"Every student, where nothing else is said below: {plan.evaluations} network evaluations of training (a backward counts two), "
        f"measured on {n} pictures of held-out prompts. TFLOP: of the training, decoder and rewards with it. ± is half a 95% t-interval "
        "over seeds; differences are paired by seed. Seconds per image are those of the machine that made the cell. FD-clip is not an FID."
    )


def students(summary: Summary) -> list[Row]:
    return [EVERY_ROW[entry["row"]] for entry in summary if entry["row"] in EVERY_ROW]


def note_on_costs(summary: Summary, plan: Plan) -> str:
    others = "; ".join(f"{row.name}: {round(plan.evaluations * row.cost)}" for row in students(summary) if row.cost != 1)
    return f"Network evaluations of the others: {others}." if others else ""


def note_on_budget(entry: dict[str, Any]) -> str:
    """Where an adaptive weight settled."""
    if "settled" not in entry:
        return ""
    settled = entry["settled"]
    keys = ("kl_over_budget", "weight", "gap_over_budget", "fresh_over_budget", "larger_over_budget")
    kl, weight, gap, fresh, larger = (number(*settled[key]) for key in keys)
    return (
        f"{entry['row']}: over the last quarter the KL is {kl} of its budget, the weight {weight}, at its cap in "
        f"{settled['at_cap'][0]:.0%} of the updates; a fake trained on the finished student alone finds {fresh} of "
        f"the budget, {gap} more than the run's own fake, after {settled['judge_updates'][0]:.0f} updates; the larger of the two, of "
        f"which each is too small on average, is {larger}. In {settled['judges_converged'][0]:.0%} of the cells the former is known to "
        "have learned what it can."
    )


def notes_on_drift(entry: dict[str, Any]) -> list[str]:
    """One for each seed."""
    return [
        f"{entry['row']}, seed {seed}: FD to teacher has a smoothed minimum of {found['minimum']:.3f} along the training; the "
        f"last third is at {found['last_third']:.3f}, standard error {found['standard_error']:.3f}."
        for seed, found in entry.get("drift", {}).get("fd_clip_teacher", {}).items()
    ]


def note_on_price(summary: Summary) -> str:
    if not any(row.price for row in students(summary)):
        return ""
    return f"Expensive reward: in the budget a pass of it counts as {PRICE:g} network evaluations, as that of a far larger one would."


def note_on_beginnings(summary: Summary, plan: Plan) -> str:
    names: dict[str, list[str]] = {}
    for row in students(summary):
        if row.begins:
            names.setdefault(row.begins, []).append(row.name)
    return " ".join(
        f"{', '.join(of_one)}: these begin from the finished student of {begins!r} of the same seed, after its "
        f"{round(plan.evaluations * EVERY_ROW[begins].cost)} network evaluations; theirs, updates and TFLOP are what came after."
        for begins, of_one in names.items()
    )


def note_on_fronts(summary: Summary) -> str:
    points = Counter(method_of(entry["row"]) for entry in summary)
    areas = "; ".join(f"{method} {area:.4g} ({points[method]} weights)" for method, area in fronts(summary).items())
    if not areas:
        return ""
    return (
        f"Hypervolume of preference against FD to teacher, from the best few-step teacher's distance and the "
        f"{drawing.TEACHER_STEPS}-step teacher's preference: {areas}."
    )


def note_on_pair(method: str, pair: Pair) -> str:
    """Two methods' fronts, seed by seed."""
    of_seeds = "; ".join(f"seed {seed} {a:.4g}, {b:.4g}" for seed, (a, b) in pair.areas.items())
    mean, half = pair.difference
    return (
        f"{method} beside DMDR's, hypervolumes by seed: {of_seeds}. "
        + ("" if pair.ratio is None else f"Their means have a ratio of {pair.ratio:.3f}. ")
        + f"The paired difference is {mean:.4g}"
        + ("." if half != half else f" ± {half:.4g}.")
    )


def number(mean: float, half: float) -> str:
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")


def made(summary: Summary, what: str) -> str:
    """How many cells are of each machine or commit, most first."""
    of_each = sum((Counter(entry[what]) for entry in summary), Counter())
    shortened = ((COMMIT.sub(r"\1", name), count) for name, count in of_each.most_common())
    return "; ".join(f"{name} ({count} cell{'s' if count > 1 else ''})" for name, count in shortened)


def ticks(low: float, high: float) -> list[float]:
    """Of a log axis: 1, 2, 5 and their tens, with more between them where fewer than three of these lie on it."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [tick for power in range(-3, 4) for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if len(found) >= 3:
            break
    return found


def plot(summary: Summary, path: Path) -> None:
    """Distance to the teacher and to data, a row each, with intervals; on a log scale, since a student may have gone astray."""
    from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's

    figure = Figure(figsize=(11, 0.34 * len(summary) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("fd_clip_teacher", "fd_clip_data"), strict=True):
        for i, entry in enumerate(summary):
            mean, half = entry["metrics"][key]
            teacher = entry["row"] in TEACHER_ROWS
            axis.errorbar(
                mean,
                i,
                xerr=None if half != half else half,
                fmt="s" if teacher else "o",
                color="#777777" if teacher else "#0072b2",
                capsize=3,
            )
        axis.set_yticks(range(len(summary)), [entry["row"] for entry in summary])
        axis.set_xlabel(tables.LABELS[key].replace("↓", "(lower is better)"))
        axis.set_xscale("log", nonpositive="clip")  # an interval may reach below zero
        means = [entry["metrics"][key][0] for entry in summary]
        low, high = 0.8 * min(means), 1.25 * max(means)
        axis.set_xticks(ticks(low, high), minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlim(low, high)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_ylim(len(summary) - 0.4, -0.6)
    replace(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


# each method's weights stand on its own side of its curve
STYLES = {"GNDMR": ("#0072b2", "o", (-6, 4), "right"), "DMDR": ("#d55e00", "s", (6, -9), "left")}
# students beside the fronts; the table's were trained half as long, which alone moves them as far as a reward does
BESIDE = {
    "": {name: f"{name}, half the training" for name in ("GNDM", "DMD", "GNDMR adaptive, budget 1.5")},
    " from one student": {BEGUN.name: "the students they begin from"},
}


def plot_pareto(summary: Summary, path: Path) -> None:
    """Preference against FD to teacher, one curve a method over its weight, the teacher beside them: of students trained from the teacher,
    and of those that begin from one student, a panel each where there are any."""
    from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's

    by_row = {entry["row"]: [entry["metrics"][key][0] for key in POINT] for entry in summary}
    points = {
        method: sorted((float(name.rpartition(" ")[2]), *at) for name, at in by_row.items() if method_of(name) == method)
        for method in METHODS
    }
    shown = [kind for kind in BESIDE if any(points[f"{method}{kind}, preference"] for method in STYLES)]
    figure = Figure(figsize=(6.4 * len(shown), 4.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    reference = corner(summary)
    for axis, kind in zip(axes[0], shown, strict=True):
        for method, (color, marker, offset, side) in STYLES.items():
            front = points[f"{method}{kind}, preference"]
            axis.plot(*([at[i] for at in front] for i in (1, 2)), marker=marker, color=color, label=f"{method}{kind}, over its weight")
            for weight, *at in front:
                axis.annotate(f"{weight:g}", at, textcoords="offset points", xytext=offset, ha=side, fontsize=8, color=color)
        for name, label in ({MANY_STEPS_ROW: MANY_STEPS_ROW} | BESIDE[kind]).items():
            if name in by_row:
                fill = "none" if name in EVERY_ROW else "full"
                axis.plot(*by_row[name], marker="*", markersize=11, color="#333333", fillstyle=fill, linestyle="none")
                axis.annotate(label, by_row[name], textcoords="offset points", xytext=(6, 6), fontsize=8)
        if reference:
            label = "corner of the hypervolumes"
            axis.plot(*reference, marker="+", markersize=14, color="#777777", linestyle="none", label=label)
        axis.set_xlabel("FD-clip to teacher (lower is better)")
        axis.set_ylabel("preference, trained on (higher is better)")
        axis.grid(alpha=0.3)
        axis.legend()
    replace(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
