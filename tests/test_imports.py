"""Imports point down only: the table of the house, as it is, with what is imported inside functions and for types alone."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
# what each file or folder imports of fewstep; of `rewards` and `evaluate.command` by file, of other folders as a whole
TABLE = {
    "errors": "", "disk": "errors", "hub": "", "launch": "", "types": "", "schedule": "", "transforms": "", "levels": "", "cost": "",
    "device": "", "prompts": "",
    "report": "disk metrics", "alarms": "",
    "weights": "alarms errors",
    "checkpoint": "disk",
    "ranks": "errors launch",
    "importance": "schedule",
    "losses": "schedule",
    "denoiser": "cost ranks schedule",
    "student": "denoiser schedule types",
    "config": "rewards.address weights",
    "metrics": "disk transforms types",
    "rewards": "",
    "rewards.base": "errors transforms types",
    "rewards.address": "",
    "rewards.files": "disk hub",
    "rewards.pixels": "",
    "rewards.heldout": "rewards.base types",
    "rewards.distribution": "denoiser errors levels losses schedule transforms types",
    "rewards.discriminator": "denoiser levels types",
    "rewards.clip": "rewards.base rewards.files rewards.pixels types",
    "rewards.aesthetic": "rewards.base rewards.clip rewards.files rewards.pixels types",
    "rewards.hps": "rewards.clip rewards.pixels",
    "rewards.remote": "errors rewards.address rewards.base",
    "rewards.sources": "config disk rewards rewards.address rewards.files rewards.remote world",
    "rewards.convert": "disk rewards rewards.aesthetic rewards.files rewards.hps rewards.sources",
    "rewards.serve": "device rewards rewards.sources",
    "models": "config denoiser disk errors hub launch schedule",
    "world": "checkpoint evaluate rewards.clip",
    "trainer": "alarms checkpoint config cost denoiser errors importance losses metrics prompts ranks "
    "rewards.base rewards.heldout student transforms types weights",
    "evaluate": "denoiser disk errors hub models prompts types "
    "rewards.base rewards.clip rewards.distribution rewards.files rewards.remote rewards.sources",
    "needs": "config cost evaluate folder launch models",
    "flags": "config errors hub models rewards.address rewards.sources",
    "folder": "config disk errors flags hub models rewards.address rewards.sources",
    "export": "checkpoint config disk evaluate flags folder hub metrics models world",
    "latents": "disk evaluate",
    "composition": "config cost device errors evaluate latents levels launch models prompts ranks student trainer types weights world "
    "rewards rewards.address rewards.base rewards.discriminator rewards.distribution rewards.remote rewards.sources",
    "evaluate.command": "composition config disk errors evaluate flags launch models needs ranks "
    "rewards rewards.address rewards.clip rewards.sources world",
    "run": "checkpoint composition config disk errors evaluate evaluate.command export flags folder hub launch models needs prompts ranks "
    "report rewards.sources world",
    "sample": "config disk errors evaluate evaluate.command flags models prompts",
    "compare": "checkpoint composition config cost disk errors evaluate flags launch models "
    "rewards.clip rewards.serve run types weights world",
    "cli": "compare disk errors evaluate.command export flags launch models run sample rewards rewards.convert rewards.serve",
    "fewstep": "errors flags launch models run",
}  # fmt: skip
DIFFUSERS = {"models", "world", "evaluate", "trainer"}
# scorers' packages, by the files of rewards that may name them
SCORERS = {"transformers": {"rewards.aesthetic", "rewards.clip", "rewards.convert"}, "open_clip": set(), "hpsv2": set(),
           "hpsv3": {"rewards.serve"}, "ImageReward": {"rewards.serve"}}  # fmt: skip


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in ROOT.rglob("*.py")}


def unit(module):
    """A module by its row of the table."""
    parts = module.split(".")[1:] or ["fewstep"]
    whole = ".".join(parts)
    return whole if parts[0] == "rewards" or whole == "evaluate.command" else parts[0]


def imported(path):
    """Every module that a file imports, wherever in the file; `from package import module` is the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            whole = {each.name: f"{node.module}.{each.name}" for each in node.names}
            found |= {name if name in MODULES else node.module for name in whole.values()}
    return found


IMPORTED = {module: imported(path) for module, path in MODULES.items()}


def of_row(row):
    return set().union(*(names for module, names in IMPORTED.items() if unit(module) == row))


def test_the_table_has_every_file():
    assert {unit(module) for module in MODULES} == TABLE.keys()


@pytest.mark.parametrize("row", TABLE)
def test_a_file_imports_what_the_table_says(row):
    own = {unit(name) for name in of_row(row) if name.partition(".")[0] == "fewstep"} - {row}
    assert own == set(TABLE[row].split())


def test_no_file_imports_itself_by_way_of_others():
    """Wherever an import stands: what two files need of each other belongs into a third."""
    graph = {module: {name for name in names if name in MODULES and name != module} for module, names in IMPORTED.items()}
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) == len(MODULES)


def test_the_pure_files_import_torch_alone():
    for row in ("types", "schedule", "transforms", "importance", "losses", "levels", "weights", "cost", "ranks", "denoiser", "student"):
        others = {name.partition(".")[0] for name in of_row(row)} - set(sys.stdlib_module_names) - {"fewstep"}
        assert others <= {"torch"}, row


def test_rewards_and_models_never_import_each_other():
    rows = {row: set(names.split()) for row, names in TABLE.items()}
    assert not any(name.startswith("rewards") for name in rows["models"])
    assert not any("models" in names for row, names in rows.items() if row.startswith("rewards"))


def test_nothing_below_the_composition_imports_it_or_what_stands_above():
    above = {"composition", "run", "sample", "compare", "cli", "evaluate.command"}
    for row, names in TABLE.items():
        below = row not in above | {"fewstep"}
        assert not (below and set(names.split()) & above), row
        assert "trainer" not in names.split() or row == "composition", row


def test_diffusers_and_scorers_packages_stay_where_they_belong():
    """Only models, world, evaluate and the trainer's EMA touch diffusers."""
    users = {row for row in TABLE if any(name.partition(".")[0] == "diffusers" for name in of_row(row))}
    assert users == DIFFUSERS
    assert {name for name in of_row("trainer") if name.startswith("diffusers")} == {"diffusers.training_utils"}
    for package, files in SCORERS.items():
        assert {row for row in TABLE if row.startswith("rewards") and any(n.partition(".")[0] == package for n in of_row(row))} == files
