"""Reports as tables, with what has to be said beside their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from fewstep.evaluate.measure import (
    DISTANCES,
    SHUFFLED,
    Measured,
)
from fewstep.evaluate.protocol import compared, differences, stamp_of

LABELS = {
    "fid_data": "FID to data ↓",
    "fid_teacher": "FID to teacher (FID-SD) ↓",
    "kid_data": "KID to data ↓",
    "kid_teacher": "KID to teacher ↓",
    "patch_fid_data": "patch-FID to data ↓",
    "patch_fid_teacher": "patch-FID to teacher ↓",
    "fd_clip_data": "FD-clip to data ↓",
    "fd_clip_teacher": "FD-clip to teacher ↓",
    "cmmd_data": "CMMD to data ↓",
    "cmmd_teacher": "CMMD to teacher ↓",
    "clip": "CLIPScore, clip ↑",
    "clip_over_shuffled": "  above shuffled captions ↑",
    "clip-heldout": "CLIPScore, clip-heldout ↑",
    "clip-heldout_over_shuffled": "  above shuffled captions ↑",
    "preference": "PickScore, preference ↑",
    "preference_over_shuffled": "  above shuffled captions ↑",
    "utility": "gold utility ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "diversity": "diversity within a prompt ↑",
    "network_evaluations": "network evaluations per image",
    "seconds_per_image": "seconds per image",
}


SECONDS = "seconds_per_image"


def cell(measured: dict[str, float] | None) -> str:
    """`value [low, high]`, to four digits; the value alone where it is exact. A star marks a mean that misses pictures."""
    if measured is None:
        return "-"
    value, low, high = (f"{measured[key]:.4g}" for key in ("value", "low", "high"))
    return (value if measured["low"] == measured["high"] else f"{value} [{low}, {high}]") + ("*" if measured.get("masked") else "")


def columns(report: dict[str, Any]) -> list[str]:
    """Names of the report's samples, the best few-step teacher marked, and the paired difference where there is one."""
    return [name + (" (best)" if name == report["best_solver"] else "") for name in measured_in(report)]


def measured_in(report: dict[str, Any]) -> dict[str, Measured]:
    """Column -> its metrics: the samples, and the paired difference where there is one."""
    found = {row["name"]: row["metrics"] for row in report["rows"]}
    return found | ({"student - teacher, paired": report["paired"]["metrics"]} if report.get("paired") else {})


def as_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(metric, one cell for each of `columns`), in a fixed order."""
    return written_rows(measured_in(report), seconds_marks(timings(report)))


def written_rows(measured: Mapping[str, Measured], marks: Mapping[tuple[str, str], str]) -> list[tuple[str, list[str]]]:
    """(metric, one cell for each column). marks: what stands behind a number, by (metric, column)."""
    names = names_in(measured.values())
    return [
        (label(name, names), [cell(metrics.get(name)) + marks.get((name, column), "") for column, metrics in measured.items()])
        for name in names
    ]


def names_in(measured: Iterable[Measured]) -> list[str]:
    """Every metric that one of the samples has."""
    return list(dict.fromkeys(itertools.chain(*measured)))


def timings(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Row -> what its seconds per image belong to; an early report says the device alone."""
    return {row["name"]: row.get("timed") or {"device": row.get("device") or report["protocol"]["device"]} for row in report["rows"]}


def says_together(report: dict[str, Any]) -> bool:
    """Whether its rows say how many pictures were drawn together; an early report's do not."""
    return all("drawn_together" in timed for timed in timings(report).values())


def timed_otherwise(timed: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Column -> how its seconds were measured otherwise than the first column's, as `field: first / this`, or on several devices, or
    with several numbers of pictures together; no entry where they compare. What one of the two does not say is not compared."""
    first = next(iter(timed.values()))
    found = {}
    for column, own in timed.items():
        shared = first.keys() & own.keys()
        lines = differences(*({key: held[key] for key in sorted(shared)} for held in (first, own)))
        lines = lines or [f"{key}: {' and '.join(map(str, value))}" for key, value in own.items() if isinstance(value, list)]
        found |= {column: lines} if lines else {}
    return found


def seconds_marks(timed: Mapping[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """A mark for every column whose seconds per image do not compare with the first one's."""
    return {(SECONDS, column): " ‡" for column in timed_otherwise(timed)}


def seconds_note(timed: Mapping[str, dict[str, Any]]) -> list[str]:
    """Which seconds per image do not compare, and why."""
    each = "; ".join(f"{column} ({'; '.join(lines)})" for column, lines in timed_otherwise(timed).items())
    return [f"‡ seconds per image that were not measured as those of {next(iter(timed))}, and do not compare: {each}"] if each else []


def label(name: str, among: Collection[str] | None = None) -> str:
    """What a table calls a metric: distances by their network, judges as they were named.

    among: the table's metrics. A judge may be called as a CLIP of the embedded world is; only CLIPs are measured against shuffled captions.
    """
    is_judge = among is not None and f"{name}{SHUFFLED}" in LABELS and f"{name}{SHUFFLED}" not in among
    if name in LABELS and not is_judge:
        return LABELS[name]
    stem, _, what = name.rpartition("_")
    kind, _, network = stem.partition(".")
    if network and kind in DISTANCES and what in ("data", "teacher"):
        return LABELS[f"{kind}_{what}"].replace(" to ", f" of {network} to ", 1)
    if kind.startswith("fd_") and what in ("data", "teacher"):
        return f"FD-{stem.removeprefix('fd_')} to {what} ↓"
    return "  above shuffled captions ↑" if name.endswith(SHUFFLED) else f"{name} ↑"


def plain(name: str, among: Collection[str] | None = None) -> str:
    """A metric's label without what is better; among: as of `label`."""
    return label(name, among).removesuffix(" ↓").removesuffix(" ↑").strip()


def notes(report: dict[str, Any]) -> list[str]:
    """What has to be said beside the numbers: what was left out, what misses pictures, intervals of another kind, seconds measured
    otherwise."""
    return [*apart_from_seconds(report), *seconds_note(timings(report))]


def apart_from_seconds(report: dict[str, Any]) -> list[str]:
    said = [f"no {plain(name)}: {why}" for name, why in report.get("left_out", {}).items()]
    measured = measured_in(report)
    for name in names_in(measured.values()):
        short = {column: masked for column, metrics in measured.items() if (masked := metrics.get(name, {}).get("masked"))}
        if short:
            missing = "; ".join(f"{masked} ({column})" for column, masked in short.items())
            said.append(f"* {plain(name)}: a mean over the pictures that got a score; of {report['protocol']['n']}, none for {missing}")
    other = report["interval"].get("jackknife")
    if other:
        said.append(f"intervals of {', '.join(other['metrics'])}: jackknife over {other['blocks of prompts']} blocks of prompts")
    return said


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    protocol, level = report["protocol"], report["interval"]["level"]
    seeds = f"seed {protocol['seeds']['rows']}"
    if "reference" in protocol["seeds"]:
        seeds += f", teacher's reference sample {protocol['seeds']['reference']}"
    height, width = of if isinstance(of := protocol["resolution"], list) else (of, of)
    drawn = f"n = {protocol['n']} ({protocol['images_per_prompt']} per prompt), {height} x {width} pixels"
    title = f"{drawn}, {seeds}, {level:.0%} intervals over prompts"
    return as_written(columns(report), as_rows(report), title=title, said=notes(report))


def as_written(titles: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, title: str | None = None, said: Sequence[str]) -> Table:
    """A table whose words are shown as they are: rich would take brackets in a path or a name for its own marks."""
    table = Table("", *map(escape, titles), title=title, caption=escape("\n".join(said)) or None)
    for name, cells in rows:
        table.add_row(escape(name), *map(escape, cells))
    return table


def verdicts(name: str, other: str, found: Mapping[str, list[str]], among: Collection[str]) -> list[str]:
    """What differences in the stamps of two reports mean for the numbers that both have. found: as `compared` has it; among: those
    numbers."""
    if any(SECONDS in metrics for metrics in found.values()):  # what decides them decides every number
        return [f"† {name} was measured otherwise than {other}, and its numbers do not compare: {'; '.join(found)}"]
    alike: dict[tuple[str, ...], list[str]] = {}
    for line, metrics in found.items():
        alike.setdefault(tuple(metrics), []).append(line)
    said = []
    for metrics, lines in alike.items():
        differ = "; ".join(lines)
        if all(line.startswith(("teacher", "seeds.reference")) for line in lines):
            said.append(
                f"† {name} was measured beside another teacher than {other}, and its distances to the teacher do not compare: {differ}"
            )
        else:
            labels = "; ".join(plain(metric, among) for metric in metrics if not metric.endswith(SHUFFLED))
            said.append(f"† of {name} and {other} these numbers do not compare: {labels}, which differ in {differ}")
    return said


def beside(reports: Mapping[str, dict[str, Any]]) -> Table:
    """Reports by name in one table. Numbers are compared with those of the first report that has them: what was measured otherwise is
    marked, the whole report where that is all of it, and seconds per image that were measured otherwise than the first ones; what differs
    is said below."""
    first, *_ = reports
    held = {name: names_in(row["metrics"] for row in report["rows"]) for name, report in reports.items()}
    owner = {metric: name for name in reversed(reports) for metric in held[name]}
    said, titles, marks = [], {}, {}
    for name, report in reports.items():
        marked: set[str] = set()
        for other in itertools.takewhile(lambda other, name=name: other != name, reports):
            among = [metric for metric in held[name] if owner[metric] == other]
            found, unknown = compared(stamp_of(reports[other]), stamp_of(report), among)
            marked.update(*found.values())
            said += verdicts(name, other, found, among)
            if other == first and says_together(report) != says_together(reports[first]):
                unknown.append("drawn_together")
            if unknown and among:
                said.append(f"{name} or {other} is of an earlier version, whose stamp lacks {', '.join(unknown)}: not compared")
        said += [f"{name}: {note}" for note in apart_from_seconds(report)]
        whole = marked and marked == {metric for metric in held[name] if owner[metric] != name}
        for row in report["rows"]:
            title = f"{name}: {row['name']}"
            titles[title] = title + (" †" if whole else "")
            marks |= {} if whole else {(metric, title): " †" for metric in marked & row["metrics"].keys()}
    samples = {f"{name}: {row['name']}": row["metrics"] for name, report in reports.items() for row in report["rows"]}
    timed = {f"{name}: {row}": own for name, report in reports.items() for row, own in timings(report).items()}
    rows = written_rows(samples, marks | seconds_marks(timed))
    return as_written([titles[title] for title in samples], rows, said=[*said, *seconds_note(timed)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def as_markdown(report: dict[str, Any]) -> str:
    """An evaluation's report as a Markdown table with what it was measured on."""
    stamp = report["protocol"]
    table = markdown_table(["", *columns(report)], [[name, *cells] for name, cells in as_rows(report)])
    seeds = ", ".join(f"{name} {seed}" for name, seed in stamp["seeds"].items())
    prompts = f"prompt of {stamp['set']}" if stamp.get("set") else "held-out prompt"
    features = f"features of `{stamp['extractor']}`, " if stamp["extractor"] else ""
    said = "".join(f"{note[0].upper()}{note[1:]}. " for note in notes(report))
    return (
        f"{table}\n\nMeasured on {stamp['n']} pictures a column ({stamp['images_per_prompt']} for each {prompts}, seeds: {seeds}), "
        f"{report['interval']['level']:.0%} bootstrap intervals over prompts, {features}on {stamp['device']}. {said}"
        "FD-clip is a Frechet distance of CLIP features, not an FID. Full protocol: `evaluation.json`."
    )
