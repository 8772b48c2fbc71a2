"""The tables of README.md, docs/rewards.md and docs/evaluation.md, and the expected numbers in the recipes, from committed results.

`python docs/readme_table.py` writes the tables between their markers, and in each measured recipe the line that begins with "# Measured".

docs/results/distill.json is the `evaluation.json` of `fewstep distill`, distill-2050.json that of `fewstep distill --updates 2050`,
gndmr.json, gndmr-remote.json and those in docs/results/budget/ those of the commands in docs/rewards.md, beside which logs-NAME.json has
some keys of the same run's `metrics.jsonl`, each with a list of what its updates logged (gndmr-remote's were not kept);
docs/results/coverage.json is that of `python bench/intervals.py --output`;
docs/results/compare/ is what several calls of `fewstep compare --output docs/results/compare` left: with `--rows table`, with
`--rows pareto --seeds 3`, and with `--rows NAME --seeds N` for rows of other numbers of seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.compare.render import number
from fewstep.compare.rows import DISTANCES, MAIN_SEEDS
from fewstep.compare.summary import interval, settled
from fewstep.evaluate.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"**student, 4 steps**": "distill.json", "student, 4 steps, 2050 updates": "distill-2050.json"}
BEYOND = {
    "budget 1.5, 305 updates": "gndmr.json",
    "budget 1.5, 600 updates, preference behind a server": "gndmr-remote.json",
}
SCORES = {
    "clip": "CLIPScore, trained on ↑",
    "preference": "preference, trained on ↑",
    "clip-heldout": "CLIPScore, held out ↑",
    "utility": "gold utility, held out ↑",
    "fd_clip_teacher": "FD-clip to teacher ↓",
    "diversity": "diversity within a prompt ↑",
}
MEASURED = "# Measured (docs/results/compare): "
BEGIN, END = "<!-- {name}: python docs/readme_table.py -->", "<!-- end -->"
RECIPES = {
    "gndm": ("GNDM", "the default: group-normalised distribution matching"),
    "gndmr": ("GNDMR adaptive, budget 1.5", "GNDM, `clip` and `preference` with an adaptive weight"),
    "gndmr-1": ("GNDMR-1, budget 1.5", "the same with `preference` alone"),
    "gndm-is": ("GNDM-IS", "GNDM with rollouts reused, and evaluations where importance weights allow it (next to none here)"),
    "gndmr-is": ("GNDMR-IS, budget 1.5", "GNDMR with both kinds of reuse"),
    "dmd": ("DMD", "baseline: each sample divided by its own denoising error"),
    "dmd2": ("DMD2", "baseline: DMD with a discriminator, backward simulation and one unconditioned fake"),
    "dmdr": ("DMDR (sum)", "baseline: DMD with raw reward gradients added (the plain sum, not the whole of arXiv 2511.13649)"),
}
COMPARED = {
    "fd_clip_data": "FD to data ↓",
    "fd_clip_teacher": "FD to teacher ↓",
    "clip": "CLIPScore ↑",
    "clip-heldout": "held out ↑",
    "preference": "preference ↑",
    "utility": "gold utility ↑",
    "diversity": "diversity ↑",
}
REACHED = ("fd_clip_data", "fd_clip_teacher", "preference", "utility")
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


def main_job() -> str:
    """One column a run, then the teacher at 28 steps and the best few-step teacher, as Markdown."""
    results = ROOT / "docs" / "results"
    reports = {name: json.loads((results / file).read_text()) for name, file in RUNS.items() if (results / file).is_file()}
    columns = {name: report["rows"][0] for name, report in reports.items()}
    first = next(iter(reports.values()))
    columns |= {row["name"]: row for row in (first["rows"][1], next(r for r in first["rows"] if r["name"] == first["best_solver"]))}
    rows = [[label, *(cell(row["metrics"][key]) for row in columns.values())] for key, label in LABELS.items()]
    return markdown_table(["", *columns], rows)


def compared() -> list[dict[str, Any]]:
    """Rows of the comparison, in its order."""
    return json.loads((ROOT / "docs" / "results" / "compare" / "compare.json").read_text())["rows"]


def expected(recipe: str) -> str:
    """A recipe's file with what it reached in the comparison, below the comment that says what it is."""
    name = RECIPES[recipe][0]
    (row,) = (row for row in compared() if row["row"] == name)
    told = [f"{COMPARED[key][:-2]} {number(*row['metrics'][key])}" for key in REACHED]
    seeds = f"{len(row['seeds'])} seeds" if len(row["seeds"]) > 1 else "one seed"
    seeds += f", with a {other}" if (other := apart(name)) else ""
    lines = [line for line in recipe_file(recipe).read_text().splitlines() if not line.startswith(MEASURED[:10])]
    about = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join([*lines[:about], f"{MEASURED}{', '.join(told)}; {seeds}.", *lines[about:]]) + "\n"


def apart(row: str) -> str:
    """In what a row is not its recipe, in words: "budget of 1.5"; nothing where it is."""
    setting, _, value = row.partition(", ")[2].rpartition(" ")
    return f"{setting} of {value}" if setting else ""


def recipe_file(recipe: str) -> Path:
    return ROOT / "fewstep" / "recipes" / f"{recipe}.yaml"


def recipes() -> str:
    """What each recipe is, and what it reached in the comparison."""
    rows = {row["row"]: row for row in compared()}
    body = []
    for recipe, (name, text) in RECIPES.items():
        text += f" (measured with a {other})" if (other := apart(name)) else ""
        numbers = [number(*rows[name]["metrics"][key]) if name in rows else "not run yet" for key in REACHED]
        body.append([f"`{recipe}`", text, *numbers])
    return markdown_table(["recipe", "what it is", *(COMPARED[key] for key in REACHED)], body)


def comparison() -> str:
    """Every row that has been run, with the paired difference to its baseline; those of fewer than five seeds folded in."""

    def table(rows: list[dict[str, Any]]) -> str:
        body = []
        for row in rows:
            numbers = [number(*row["metrics"][key]) for key in COMPARED]
            paired = [f"{number(*row['paired'][key])} ({row['baseline']})" if row["paired"] else "" for key in DISTANCES]
            body.append([row["row"], str(len(row["seeds"])), *numbers, *paired])
        return markdown_table(["", "seeds", *COMPARED.values(), "FD to data − baseline", "FD to teacher − baseline"], body)

    rows = compared()
    shown, folded = ([row for row in rows if (len(row["seeds"]) >= MAIN_SEEDS) is many] for many in (True, False))
    summary = f"{len(folded)} more rows, of fewer seeds: scales, reuse, budgets, long runs, fronts"
    return f"{table(shown)}\n\n<details>\n<summary>{summary}</summary>\n\n{table(folded)}\n\n</details>"


def beyond() -> str:
    """Students of two rewards beside their teacher, by every scorer that they were trained on or judged by."""
    results = ROOT / "docs" / "results"
    reports = {name: json.loads((results / file).read_text()) for name, file in BEYOND.items() if (results / file).is_file()}
    columns = {"teacher, 28 steps": next(iter(reports.values()))["rows"][1]} | {name: report["rows"][0] for name, report in reports.items()}
    body = [[label, *(cell(row["metrics"][key]) for row in columns.values())] for key, label in SCORES.items()]
    return markdown_table(["", *columns], body)


def of_budget(prefix: str = "") -> dict[int, dict[str, Any]]:
    """What is kept of the runs under the default budget and of GNDM's of the same seeds, by seed and recipe."""
    budget = ROOT / "docs" / "results" / "budget"
    seeds = sorted(int(path.stem.rpartition("seed")[2]) for path in budget.glob("gndmr-seed*.json"))
    return {
        seed: {recipe: json.loads((budget / f"{prefix}{recipe}-seed{seed}.json").read_text()) for recipe in ("gndm", "gndmr")}
        for seed in seeds
    }


def by_seed() -> str:
    """Students of the default budget beside GNDM's of the same seeds: distance, and scores minus the teacher's; then their differences."""

    def columns(report: dict[str, Any]) -> list[dict[str, float]]:
        own, paired = report["rows"][0]["metrics"], report["paired"]["metrics"]  # a distance has no pair
        return [paired.get(key, own[key]) for key in SCORES]

    reports = of_budget()
    body = [[f"`{recipe}`, seed {seed}", *map(cell, columns(report))] for seed, of in reports.items() for recipe, report in of.items()]
    pairs = [[columns(of[recipe]) for recipe in ("gndmr", "gndm")] for of in reports.values()]
    moved = [[a["value"] - b["value"] for a, b in zip(*pair, strict=True)] for pair in pairs]
    body.append([f"`gndmr` − `gndm`, {len(reports)} seeds", *(number(*interval([*of])) for of in zip(*moved, strict=True))])
    return markdown_table(["", *SCORES.values()], body)


def standing(own: dict[str, list[float | None]]) -> tuple[dict[str, str], int]:
    """(where a budget and its weight stood over the last quarter of a run's updates after the warm-up, as `settled` has it; how many these
    are)."""
    updates = [{key: at for key, at in zip(own, logged, strict=True) if at is not None} for logged in zip(*own.values(), strict=True)]
    at, last = settled(updates), sum("weights/budget" in logs for logs in updates) // 4
    both = sum(own["clip/share"][-last:] + own["preference/share"][-last:]) / last
    return {
        "KL over the budget": f"{at.kl_over_budget:.2f}",
        "the budget, nats": f"{own['weights/budget'][-1]:.1f}",
        "weight": f"{at.weight:.2f}",
        "both rewards' share of the update": f"{both:.0%}",
    }, last


def stood() -> str:
    """Where the default budget stood in those runs, and GNDM's own score beside it."""
    columns = {}
    for seed, of in of_budget("logs-").items():
        columns[f"seed {seed}"], last = standing(of["gndmr"])
        columns[f"seed {seed}"]["minus the score of `gndm` alone, nats"] = f"{-sum(of['gndm']['dm/score'][-last:]) / last:.1f}"
    rows = [[label, *(of[label] for of in columns.values())] for label in next(iter(columns.values()))]
    return markdown_table(["over the last quarter of the updates after the warm-up", *columns], rows)


def beyond_paired() -> str:
    """Those students minus their teacher, picture by picture, and where the budget of the first stood."""
    results = ROOT / "docs" / "results"
    reports = {name: json.loads((results / file).read_text())["paired"]["metrics"] for name, file in BEYOND.items()}
    body = [
        [label, *(cell(of[key]) for of in reports.values())] for key, label in SCORES.items() if all(key in of for of in reports.values())
    ]
    stands, _ = standing(json.loads((results / "logs-gndmr.json").read_text()))
    body += [[label, text, "not kept"] for label, text in stands.items()]
    return markdown_table(["", *reports], body)


def covered() -> str:
    """How often 95% intervals cover, and how wide they are."""
    names = {
        "fid_data": "Frechet distance to real pictures",
        "fid_teacher": "Frechet distance to the teacher",
        "kid_data": "KID to real pictures",
        "precision": "precision",
        "recall": "recall",
        "score": "mean of a reward",
        "diversity": "diversity",
    }
    settings = json.loads((ROOT / "docs" / "results" / "coverage.json").read_text())["settings"]
    columns = [f"{of['prompts']} x {of['images_per_prompt']}{', jackknifed' if of['jackknifed'] else ''}" for of in settings]
    body = []
    for name, label in names.items():
        found = [of["coverage"].get(name) for of in settings]
        body.append([label, *(f"{each['covered']:.1%} ({each['width']:.2f})" if each else "" for each in found)])
    return markdown_table(["prompts x pictures", *columns], body)


PAGES = {
    "README.md": {"numbers": main_job, "recipes": recipes, "comparison": comparison},
    "docs/rewards.md": {"beyond": beyond, "by seed": by_seed, "where it stood": stood, "beyond, paired": beyond_paired},
    "docs/evaluation.md": {"coverage": covered},
}


def written(page: str) -> str:
    """The page, named by its path, with each of its tables between their markers."""
    text = (ROOT / page).read_text()
    for name, table in PAGES[page].items():
        begin = BEGIN.format(name=name)
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{page} has no line {begin}")
        _, _, after = rest.partition(END)
        text = f"{before}{begin}\n{table()}\n{END}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(written(page))
    for recipe in RECIPES:
        recipe_file(recipe).write_text(expected(recipe))
