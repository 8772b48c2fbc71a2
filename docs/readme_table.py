"""The README's table of the main job, from the evaluations that its runs left: `python docs/readme_table.py` writes it between the markers.

docs/results/distill.json is the `evaluation.json` of `fewstep distill`, distill-2050.json that of `fewstep distill --updates 2050`.
"""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.export import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"**student, 4 steps**": "distill.json", "student, 4 steps, 2050 updates": "distill-2050.json"}
BEGIN, END = "<!-- numbers: python docs/readme_table.py -->", "<!-- end -->"
LABELS = {
    "fd_clip_teacher": "FD-clip to teacher ↓",
    "fd_clip_data": "FD-clip to held-out data ↓",
    "clip_over_shuffled": "CLIPScore above shuffled captions ↑",
    "clip-heldout_over_shuffled": "the same, held-out scorer ↑",
    "preference": "preference ↑",
    "utility": "gold utility ↑",
    "precision": "precision ↑",
    "diversity": "diversity within a prompt ↑",
    "network_evaluations": "network evaluations per image",
    "seconds_per_image": "seconds per image",
}


def cell(measured: dict[str, float]) -> str:
    value, low, high = (f"{measured[key]:.3g}" for key in ("value", "low", "high"))
    return value if measured["low"] == measured["high"] else f"{value} [{low}, {high}]"


def table() -> str:
    """One column a run, then the teacher at 28 steps and the best few-step teacher, as Markdown."""
    results = ROOT / "docs" / "results"
    reports = {name: json.loads((results / file).read_text()) for name, file in RUNS.items() if (results / file).is_file()}
    columns = {name: report["rows"][0] for name, report in reports.items()}
    first = next(iter(reports.values()))
    columns |= {row["name"]: row for row in (first["rows"][1], next(r for r in first["rows"] if r["name"] == first["best_solver"]))}
    rows = [[label, *(cell(row["metrics"][key]) for row in columns.values())] for key, label in LABELS.items()]
    return markdown_table(["", *columns], rows)


def written(readme: str) -> str:
    """The README with the table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
