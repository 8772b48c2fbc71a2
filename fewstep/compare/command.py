"""`fewstep compare`: its flags, and the processes that make the cells which are missing."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep import disk, models, world
from fewstep.compare.cells import Cells, Key, Plan, beginning, cell_path, kept, student_digest, target_guidance
from fewstep.compare.making import make_cell, reference
from fewstep.compare.render import markdown, plot, plot_pareto
from fewstep.compare.rows import BY_NAME, EVERY_ROW, FROM_ONE, GRID, PARETO, ROWS, TEACHER_ROWS, Row
from fewstep.compare.summary import METHODS, fronts, method_of, paired_fronts, summarise
from fewstep.composition import resolve_hardware
from fewstep.config import Config
from fewstep.errors import UserError, nearest
from fewstep.flags import command_parser
from fewstep.launch import set_variable
from fewstep.rewards.serve import end_with_parent

SETS = {"table": ROWS, "pareto": PARETO, "from-one": FROM_ONE, "grid": GRID}  # rows by one name
EVALUATIONS = 180_000  # of each student's training


def command(arguments: list[str]) -> int:
    parser = command_parser("compare", "Recipes x seeds on the embedded world, as one table.")
    parser.add_argument(
        "--output", type=Path, default=None,
        help="folder for the cells, the table and the plots; a second call goes on (default: compare, with --quick compare-quick)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="make cells anew that the folder holds with other settings")
    parser.add_argument(
        "--rows", nargs="+", default=None, metavar="NAME", help="rows, or sets of rows, to make (list: names them; default: table)"
    )
    parser.add_argument(
        "--seeds", type=int, default=None, help="seeds of every row (default: each row's own, 5 of the main rows, 1 to 3 of the rest)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=100, help="settings were chosen on seeds below 100, so that none of those is reported"
    )
    parser.add_argument(
        "--evaluations", type=int, default=None, help=f"network evaluations of each student's training (default: {EVALUATIONS})"
    )
    parser.add_argument("--jobs", type=int, default=None, help="cells side by side, one thread each (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="a smoke version: two rows, one seed, students of two steps, a few updates")
    options = parser.parse_args(arguments)
    if options.rows == ["list"]:
        print("\n".join(f"{name}: {len(rows)} rows" for name, rows in SETS.items()), *EVERY_ROW, sep="\n")
        return 0
    for name in options.rows or ():
        if name not in EVERY_ROW and name not in SETS:
            raise UserError(f"--rows: unknown row {name!r}{nearest(name, (*SETS, *EVERY_ROW))}")
    for name in ("rows", "evaluations", "jobs"):
        if options.quick and getattr(options, name) is not None:
            raise UserError(f"--{name}: cannot be combined with --quick, which has its own")
    for name in ("seeds", "evaluations", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}: must be at least 1, got {value}")
    output, seeds, jobs = options.output or Path("compare-quick" if options.quick else "compare"), options.seeds, options.jobs or 2
    rows = tuple(dict.fromkeys(row for name in options.rows or ["table"] for row in SETS.get(name, (EVERY_ROW.get(name),))))
    device = resolve_hardware(Config(device=options.device)).device
    evaluations = options.evaluations or EVALUATIONS
    plan = Plan(output, evaluations, images_per_prompt=world.IMAGES_PER_PROMPT, prompts=128, threads=1, device=device)
    if options.quick:
        small = ("--groups", "2", "--group-size", "2", "--steps", "2")
        plan = replace(plan, evaluations=200, images_per_prompt=3, prompts=24, options=small)
        rows, seeds, jobs = (EVERY_ROW["DMD"], EVERY_ROW["GNDM"]), seeds or 1, 1
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError('the plots need matplotlib: pip install "fewstep[plot]"') from error
    models.quiet_libraries()
    world.prompts("evaluate")
    try:
        summary = compare(plan, rows, seeds=seeds, first_seed=options.first_seed, jobs=jobs, overwrite=options.overwrite)
    except CellsFailed as error:
        raise UserError(str(error)) from error
    plot([entry for entry in summary if method_of(entry["row"]) not in METHODS], output / "compare.png")
    if any(method_of(entry["row"]) in METHODS for entry in summary):
        plot_pareto(summary, output / "pareto.png")
    else:
        (output / "pareto.png").unlink(missing_ok=True)  # of cells that are gone
    print((output / "compare.md").read_text(encoding="utf-8"))
    return 0


class CellsFailed(RuntimeError):
    """Which cells could not be made, and why."""


def begin_worker() -> None:
    """A process that makes cells ends with the one that started it, and at Ctrl-C, which a terminal sends to both, by itself."""
    end_with_parent()
    models.quiet_libraries()  # before the teacher's sample too
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as an exception it would cost its cell alone, and the next one would begin


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that make cells; what ends the block early ends them too, in the middle of a cell.

    Raises CellsFailed where one was killed.
    """
    if sys.platform == "win32":
        jobs = min(jobs, 61)  # it waits for no more
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            why = "a process was killed, as where memory runs out: try fewer --jobs. The finished cells are kept: the same call goes on"
            raise CellsFailed(why) from error
        raise
    pool.shutdown()


def compare(
    plan: Plan, rows: tuple[Row, ...], *, seeds: int | None, first_seed: int, jobs: int, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Make every missing cell, write compare.json and compare.md of all that the folder holds; returns the summary.

    seeds: of every row, instead of its own number. Rows come in the order given, a row's seeds one after the other.
    overwrite: a cell that was made with other settings is replaced; else raises UserError.
    Raises CellsFailed when any did, after the others have been made, and at once where a process was killed or the teacher's sample,
    which every cell is compared with, could not be drawn.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    for folder in (plan.output, plan.output / "cells"):
        disk.clear(folder)
    teacher_seeds = range(first_seed, first_seed + (seeds or max(row.seeds for row in rows)))
    compared = {world.TEACHER_GUIDANCE, *(target_guidance(plan, row) for row in rows)}
    wanted = [(name, seed) for name, row in TEACHER_ROWS.items() if row.guidance in compared for seed in teacher_seeds]
    wanted += [(row.name, seed) for row in rows for seed in range(first_seed, first_seed + (seeds or row.seeds))]
    cells, failed = kept(plan), {}
    # and the cells whose students others begin from
    wanted = list(dict.fromkeys([*filter(None, map(beginning, wanted)), *wanted]))
    missing = [key for key in wanted if key not in cells]
    # a cell whose student others begin from is made again where the student was not kept
    missing += [key for key in dict.fromkeys(map(beginning, missing)) if key in cells and student_digest(plan, *key) is None]
    replaced = [path.name for key in missing if (path := cell_path(plan, *key)).exists()]
    if replaced and not overwrite:
        raise UserError(
            f"--output: {plan.output} holds {len(replaced)} of the cells that are to be made, with other settings or without the student "
            f"that others begin from ({replaced[0]}); name another folder, or add --overwrite to make them anew"
        )
    print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are there; making {len(missing)}", flush=True)
    set_variable("OMP_NUM_THREADS", str(plan.threads))  # of the processes started from here
    if missing:
        began = time.perf_counter()
        with workers(jobs) as pool:
            targets = sorted({target_guidance(plan, BY_NAME[row]) for row, _ in missing})
            draw_references(pool, plan, targets)
            done, whole = 0.0, sum(map(work, missing))
            for count, (key, made) in enumerate(made_in(pool, plan, missing), 1):
                done += work(key)
                left = f"about {(time.perf_counter() - began) * (whole / done - 1) / 60:.0f} min left"
                if isinstance(made, Exception):
                    failed[key] = made
                    print(f"{count}/{len(missing)}  {key[0]}, seed {key[1]}: FAILED, {made!r}; {left}", flush=True)
                    continue
                cells[key] = made
                value = made["metrics"]["fd_clip_teacher"]
                print(f"{count}/{len(missing)}  {key[0]}, seed {key[1]}: FD to teacher {value:.3f}; {left}", flush=True)
                write(plan, cells)
    if failed:
        list_of = "\n".join(f"  {row}, seed {seed}: {error!r}" for (row, seed), error in failed.items())
        raise CellsFailed(
            f"{len(failed)} of {len(wanted)} cells failed; the others are kept, and a second call makes only these:\n{list_of}"
        )
    return write(plan, cells)


def work(key: Key) -> float:
    """How long a cell takes beside a student of the table; a teacher's 28 steps are drawn in about a fifth of its training."""
    return EVERY_ROW[key[0]].cost if key[0] in EVERY_ROW else 0.2


def made_in(pool: Executor, plan: Plan, keys: list[Key]) -> Iterator[tuple[Key, dict[str, Any] | Exception]]:
    """Each key with its cell, or with why there is none, as they are finished; a cell that begins from another's student comes after it.

    Raises BrokenProcessPool where a process was killed.
    """
    waiting = [key for key in keys if beginning(key) in keys]
    pending = {pool.submit(make_cell, plan, *key): key for key in keys if key not in waiting}
    while pending:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            key, error = pending.pop(future), future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            yield key, error or future.result()
            for next_ in [other for other in waiting if beginning(other) == key]:
                if error:
                    yield next_, RuntimeError(f"the student that it begins from, of {key[0]}, could not be made")
                else:
                    pending[pool.submit(make_cell, plan, *next_)] = next_


def draw_references(pool: Any, plan: Plan, targets: list[float]) -> None:
    """The teacher's samples, before the cells that are compared with them. Raises CellsFailed."""
    for drawn in [pool.submit(reference, plan, guidance) for guidance in targets]:
        try:
            drawn.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            raise CellsFailed(f"the teacher's sample, which cells are compared with, could not be drawn: {error!r}") from error


def write(plan: Plan, cells: Cells) -> list[dict[str, Any]]:
    """compare.json and compare.md of these cells; returns the summary."""
    summary = summarise(cells)
    pairs = paired_fronts(cells, summary)
    report = {
        "evaluations": plan.evaluations,
        "n": plan.prompts * plan.images_per_prompt,
        "rows": summary,
        "hypervolume": fronts(summary),
        "hypervolume_by_seed": {method: pair._asdict() for method, pair in pairs.items()},
        "cells": [{key: value for key, value in cell.items() if key != "trace"} for _, cell in sorted(cells.items())],
    }
    disk.replace_text(plan.output / "compare.json", json.dumps(report, indent=1))
    disk.replace_text(plan.output / "compare.md", markdown(summary, pairs, plan))
    return summary
