"""A cell of the comparison as it is kept: its plan, its settings, its file, and whether it was made as it would be now.

A cell is one recipe with one seed: trained until its networks have been evaluated `evaluations` times (a backward counts as two
forwards), then measured. Every finished cell is a file; a run that goes on makes only those that are missing.
"""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep import world
from fewstep.compare.rows import BY_NAME, EVERY_ROW, UNGUIDED, Row, TeacherRow
from fewstep.disk import visible
from fewstep.evaluate import protocol, store

REFERENCE_SEED = 10_000  # of the teacher's sample that distances are taken to; cells draw with their own seeds
# fields that came after the first cells: in a stamp when not as they are by default
FIELDS_ADDED_SINCE = (
    "init", "size", "memory", "compile", "dry_run", "judge", "remote", "matching.level_density", "matching.shift",
    "matching.negative_prompt",
)  # fmt: skip
UNREAD_BUDGET = 1.5  # of stamps whose row has no adaptive weight: the default when the first cells were made
Key = tuple[str, int]  # row and seed
Cells = dict[Key, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How every cell is made and measured."""

    output: Path
    evaluations: int
    images_per_prompt: int
    prompts: int  # of the held-out prompts, how many are drawn
    threads: int
    judge_updates: int = 3000  # at most, of the fresh fake that judges an adaptive weight's budget
    device: str = "cpu"
    options: tuple[str, ...] = ()  # flags that every cell gets, after its row's own


def file_name(row: str, seed: int) -> str:
    return f"{''.join(c if c.isalnum() else '-' for c in row.lower())}-seed{seed}"


def cell_path(plan: Plan, row: str, seed: int) -> Path:
    return plan.output / "cells" / f"{file_name(row, seed)}.json"


def student_path(plan: Plan, row: str, seed: int) -> Path:
    """Folder of the finished student of a row that others begin from, as `--init` takes it."""
    return plan.output / "students" / file_name(row, seed)


def beginning(key: Key) -> Key | None:
    """The cell whose student this one begins from."""
    name, seed = key
    begins = EVERY_ROW[name].begins if name in EVERY_ROW else None
    return (begins, seed) if begins else None


def commit() -> str:
    """The commit this code is at, with + when the working tree differs; the version where there is no repository."""
    folder = Path(world.__file__).parent.parent  # all of fewstep

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {protocol.version('fewstep')}"


def student_digest(plan: Plan, row: str, seed: int) -> str | None:
    """SHA-256 of the finished student of a row that others begin from; None where none was kept, or it is damaged, which is told."""
    from fewstep import checkpoint

    left = checkpoint.checkpoints(student_path(plan, row, seed) / "checkpoints")
    try:
        return checkpoint.recorded(left[-1])[checkpoint.FILES[0]][1] if left else None
    except checkpoint.DamagedCheckpoint as error:
        warnings.warn(f"{error}; this student is trained again where another begins from it", stacklevel=2)
        return None


@functools.cache
def row_config(plan: Plan, row: Row) -> Any:
    """The config of a row's cells but for their seed: parsed once, for a table of some hundred cells."""
    from fewstep import composition, flags

    # the number of updates bounds nothing here: a cell ends by its network evaluations
    config = flags.parse_config([*row.flags, *plan.options, "--updates", "1000000", "--output", str(plan.output / "none")])
    return composition.resolve_hardware(replace(config, device=plan.device, memory=replace(config.memory, frozen="fp32")))


def config_of(plan: Plan, row: Row, seed: int) -> Any:
    """Of a student's training."""
    return replace(row_config(plan, row), seed=seed)


def target_guidance(plan: Plan, row: Row | TeacherRow) -> float:
    """Guidance of the teacher's sample that a row is compared with: a student of the unguided teacher should equal the unguided one."""
    own = row_config(plan, row).matching.guidance if isinstance(row, Row) else row.guidance
    return UNGUIDED if own == UNGUIDED else world.TEACHER_GUIDANCE


def stamp_of(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """What a cell's numbers were made with; a kept cell with another stamp is not used."""
    from fewstep import composition, flags
    from fewstep.config import Config

    row, recipe = BY_NAME[name], "teacher"
    student = row if isinstance(row, Row) else None
    if student:
        config = config_of(plan, student, seed)
        # the machine and its arithmetic are no setting: they are kept beside the cell (`machine`)
        anywhere = {"output": "", "device": "cpu", "precision": "bf16"}
        plain, untouched = (flags.as_plain(at) | anywhere for at in (config, composition.resolve_hardware(Config(device="cpu"))))
        for key in FIELDS_ADDED_SINCE:
            *sections, last = key.split(".")
            inside, default = functools.reduce(lambda at, section: (at[0][section], at[1][section]), sections, (plain, untouched))
            if inside[last] == default[last]:
                del inside[last]
        if config.weights.mode != "adaptive":
            plain["weights"]["budget"] = UNREAD_BUDGET
        recipe = store.sha256(plain)
    return {
        "config": recipe,
        "prompts": store.sha256(world.prompts("evaluate")[: plan.prompts]),
        "n": plan.prompts * plan.images_per_prompt,
        "seed": seed,
        "reference_seed": REFERENCE_SEED,
        "evaluations": round(plan.evaluations * student.cost) if student else None,
        **({"price": student.price} if student and student.price else {}),
        **({"begins": stamp_of(plan, student.begins, seed)} if student and student.begins else {}),
        "target_guidance": target_guidance(plan, row),
    }


def kept(plan: Plan) -> Cells:
    """The folder's cells of known rows that were made in this way; says of every other that it is not used."""
    cells: Cells = {}
    for path in visible(plan.output, "cells/*.json"):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            row, seed, stamp = (cell[key] for key in ("row", "seed", "stamp"))
        except (ValueError, KeyError, TypeError):
            print(f"{path.name}: damaged, not used")
            continue
        begins = beginning((row, seed))
        if row not in BY_NAME:
            print(f"{path.name}: of no row that is known, not used")
        elif stamp != stamp_of(plan, row, seed):
            print(f"{path.name}: made with other settings, not used")
        elif begins and student_digest(plan, *begins) not in (None, cell["begun"]):
            print(f"{path.name}: begun from another student of {begins[0]!r} than the one that is there, not used")
        else:
            cells[row, seed] = cell
    return cells


def machine(plan: Plan, name: str) -> str:
    """What a row's cell is made on: the processor, the arithmetic of a student's training, and the libraries."""
    row = BY_NAME[name]
    where = f"{platform.machine()}, {plan.threads} threads" if plan.device == "cpu" else protocol.device_name(plan.device)
    arithmetic = [row_config(plan, row).precision] if isinstance(row, Row) else []
    return ", ".join([where, *arithmetic, *(f"{library} {protocol.version(library)}" for library in ("torch", "diffusers"))])
