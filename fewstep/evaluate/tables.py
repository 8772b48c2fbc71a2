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
from fewstep.evaluate.protocol import compared, stamp_of

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
    measured = list(measured_in(report).values())
    names = list(dict.fromkeys(itertools.chain(*measured)))
    return [(label(name, names), [cell(metrics.get(name)) for metrics in measured]) for name in names]


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


def plain(name: str) -> str:
    """A metric's label without what is better."""
    return label(name).removesuffix(" ↓").removesuffix(" ↑").strip()


def notes(report: dict[str, Any]) -> list[str]:
    """What has to be said beside the numbers: what was left out, what misses pictures, intervals of another kind, other machines."""
    said = [f"no {plain(name)}: {why}" for name, why in report.get("left_out", {}).items()]
    measured = measured_in(report)
    for name in dict.fromkeys(itertools.chain(*measured.values())):
        short = {column: masked for column, metrics in measured.items() if (masked := metrics.get(name, {}).get("masked"))}
        if short:
            missing = "; ".join(f"{masked} ({column})" for column, masked in short.items())
            said.append(f"* {plain(name)}: a mean over the pictures that got a score; of {report['protocol']['n']}, none for {missing}")
    other = report["interval"].get("jackknife")
    if other:
        said.append(f"intervals of {', '.join(other['metrics'])}: jackknife over {other['blocks of prompts']} blocks of prompts")
    devices = {row["name"]: row["device"] for row in report["rows"] if row.get("device")}
    if len(set(devices.values())) > 1:
        each = "; ".join(f"{name}: {device}" for name, device in devices.items())
        said.append(f"drawn on different machines, whose seconds per image do not compare: {each}")
    return said


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    protocol, level = report["protocol"], report["interval"]["level"]
    seeds = f"seed {protocol['seeds']['rows']}"
    if "reference" in protocol["seeds"]:
        seeds += f", teacher's reference sample {protocol['seeds']['reference']}"
    title = f"n = {protocol['n']} ({protocol['images_per_prompt']} per prompt), {seeds}, {level:.0%} intervals over prompts"
    return as_written(columns(report), as_rows(report), title=title, said=notes(report))


def as_written(titles: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, title: str | None = None, said: Sequence[str]) -> Table:
    """A table whose words are shown as they are: rich would take brackets in a path or a name for its own marks."""
    table = Table("", *map(escape, titles), title=title, caption=escape("\n".join(said)) or None)
    for name, cells in rows:
        table.add_row(escape(name), *map(escape, cells))
    return table


def verdict(name: str, first: str, found: list[str]) -> str:
    """What differences in the stamps of two reports mean for their numbers."""
    differ = "; ".join(found)
    if all(line.startswith("teacher") for line in found):
        return f"† {name} was measured beside another teacher than {first}, and its distances to the teacher do not compare: {differ}"
    return f"† {name} was measured otherwise than {first}, and its numbers do not compare: {differ}"


def beside(reports: Mapping[str, dict[str, Any]]) -> Table:
    """Reports by name in one table. Every report whose stamp is not the first one's is marked, and what differs is said below."""
    first, *others = reports
    said = [f"{first}: {note}" for note in notes(reports[first])]
    marks = {first: ""}
    for name in others:
        found, unknown = compared(stamp_of(reports[first]), stamp_of(reports[name]))
        marks[name] = " †" if found else ""
        said += [verdict(name, first, found)] if found else []
        if unknown:
            said.append(f"{name} or {first} is of an earlier version, whose stamp lacks {', '.join(unknown)}: not compared")
        said += [f"{name}: {note}" for note in notes(reports[name])]
    samples = [(f"{name}: {row['name']}{marks[name]}", row["metrics"]) for name, report in reports.items() for row in report["rows"]]
    names = list(dict.fromkeys(metric for _, metrics in samples for metric in metrics))
    rows = ((label(name, names), [cell(metrics.get(name)) for _, metrics in samples]) for name in names)
    return as_written([title for title, _ in samples], rows, said=said)
