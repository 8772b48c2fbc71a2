"""The comparison as a table in Markdown and as pictures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from fewstep import world
from fewstep.compare.cells import Plan
from fewstep.compare.rows import COSTS, DISTANCES, EVERY_ROW, MANY_STEPS_ROW, METRICS, PRICE, TEACHER_ROWS, Row
from fewstep.compare.summary import fronts
from fewstep.evaluate import tables

COMMIT = re.compile(r"^([0-9a-f]{7})[0-9a-f]{33}")  # shortened as Git does


Summary = list[dict[str, Any]]  # as `summary.summarise` returns it


def markdown(summary: Summary, plan: Plan) -> str:
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
        note_on_fronts(summary),
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
    kl, weight, gap, fresh = (number(*settled[key]) for key in ("kl_over_budget", "weight", "gap_over_budget", "fresh_over_budget"))
    return (
        f"{entry['row']}: over the last quarter the KL is {kl} of its budget, the weight {weight}, at its cap in "
        f"{settled['at_cap'][0]:.0%} of the updates; of the finished student a fresh fake finds {fresh} of the "
        f"budget, {gap} more than the run's own fake, after {settled['judge_updates'][0]:.0f} updates; its KL is known "
        f"to have stopped rising in {settled['judges_converged'][0]:.0%} of the cells, and may be too low in the others."
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


def note_on_fronts(summary: Summary) -> str:
    points = Counter(entry["row"].rpartition(" ")[0] for entry in summary)
    areas = "; ".join(f"{method} {area:.4g} ({points[method]} weights)" for method, area in fronts(summary).items())
    if not areas:
        return ""
    return (
        f"Hypervolume of preference against FD to teacher, from the best few-step teacher's distance and the "
        f"{world.TEACHER_STEPS}-step teacher's preference: {areas}."
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.34 * len(summary) + 1.4), sharey=True, layout="constrained")
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_pareto(summary: Summary, path: Path) -> None:
    """Preference against FD to teacher, one curve a method over its weight, the teacher beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    # each method's weights stand on its own side of its curve
    styles = {"GNDMR, preference": ("#0072b2", "o", (-6, 4), "right"), "DMDR, preference": ("#d55e00", "s", (6, -9), "left")}
    for method, (color, marker, offset, side) in styles.items():
        points = [entry for entry in summary if entry["row"].startswith(method + " ")]
        points.sort(key=lambda entry: float(entry["row"].rpartition(" ")[2]))
        if points:
            x, y = ([entry["metrics"][key][0] for entry in points] for key in ("fd_clip_teacher", "preference"))
            axis.plot(x, y, marker=marker, color=color, label=f"{method.partition(',')[0]}, over its weight")
            for entry, a, b in zip(points, x, y, strict=True):
                weight = entry["row"].rpartition(" ")[2]
                axis.annotate(weight, (a, b), textcoords="offset points", xytext=offset, ha=side, fontsize=8, color=color)
    for entry in summary:
        if entry["row"] in (MANY_STEPS_ROW, "GNDM", "DMD", "GNDMR adaptive"):
            a, b = entry["metrics"]["fd_clip_teacher"][0], entry["metrics"]["preference"][0]
            # the table's students were trained half as long as the fronts', which alone moves them as far as a reward does
            student = entry["row"] in EVERY_ROW
            axis.plot(a, b, marker="*", markersize=11, color="#333333", fillstyle="none" if student else "full", linestyle="none")
            label = f"{entry['row']}, half the training" if student else entry["row"]
            axis.annotate(label, (a, b), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axis.set_xlabel("FD-clip to teacher (lower is better)")
    axis.set_ylabel("preference, trained on (higher is better)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
