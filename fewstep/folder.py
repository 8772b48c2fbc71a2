"""A run's folder: what lies in it, and what may be done to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fewstep import hub, models
from fewstep.config import FREE_ON_RESUME, OF_A_CALL, Config
from fewstep.disk import check_writable, is_one, visible
from fewstep.errors import UserError, as_word
from fewstep.flags import as_plain, as_values, without_config
from fewstep.rewards import sources
from fewstep.rewards.address import is_remote

GIVEN = "prompts.json"  # prompts that were given as a list
TEACHER_FILES = "teacher.json"  # what the teacher's weights and configurations are, of one that is a folder
SAVED_AGAIN = "where you know that it is the same one, saved again, delete {}"
RUN_FILES = (  # with the usual parts of a pipeline: a save that was cut off has no model_index.json
    "checkpoints", "samples", "tensorboard", "config.yaml", GIVEN, TEACHER_FILES, "rewards.json", "metrics.jsonl", "samples.png",
    "curves.png", "evaluation.json", "evaluation", "README.md", "export", "model_index.json", "unet", "transformer", "vae", "text_encoder",
    "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "feature_extractor",
    "image_encoder", "pytorch_lora_weights.safetensors", "pictures",
)  # fmt: skip
SAME_FOR_INIT = ("teacher", "steps", "lora_rank", "fake.condition")  # the networks that a run hands on hang on them


def run_files(output: Path) -> list[Path]:
    """Where fewstep writes in a run's folder: RUN_FILES, and the parts that the student's model_index.json there names."""
    try:
        index = json.loads((output / "model_index.json").read_text(encoding="utf-8"))
        entries = index.items() if isinstance(index, dict) else ()
    except (OSError, ValueError):
        entries = ()
    parts = [name for name, entry in entries if name.isidentifier() and isinstance(entry, list) and not models.is_null(entry)]
    return [output / name for name in dict.fromkeys([*parts, *RUN_FILES])]


def check_output(config: Config) -> None:
    """An output folder that may be written. Raises UserError."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; name a folder")
    if config.init is not None:
        init = Path(config.init)
        if not config.resume and is_one(run_of(init), output):
            raise UserError(f"init: {output} is the output folder itself; name another --output, or go on with --resume")
    held = visible(output, "*")
    is_run = holds_run(output)
    if config.resume and not is_run:
        cut = (output / "checkpoints").is_dir()
        raise UserError(f"resume: {output} holds no run to go on with" + (f": {without_config(output)}" if cut else ""))
    if held and not is_run:
        raise UserError(f"output: {output} is not empty and holds no run (it has {held[0].name!r}); name another folder")
    if is_run and not (config.resume or config.overwrite):
        raise UserError(f"output: {output} already holds a run; add --resume to go on, --overwrite to start anew, or name another --output")
    if config.resume:
        check_same_run(config, output / "config.yaml")
        check_record(output / "rewards.json")
    if config.overwrite:
        check_spared(config)
        check_links(output)
    check_writable("output", output)


def check_init(config: Config, source: str) -> None:
    """Raises UserError where there is no run to begin with, or it is known to be of another teacher or another number of steps, and says so
    where that is not known: the networks' shapes tell neither. source: the teacher's folder, or its hub id with its commit."""
    import yaml

    init = Path(str(config.init))
    if not (is_checkpoint(init) or (init / "checkpoints").is_dir()):
        raise UserError(
            f"init: {init} holds no checkpoints of a run and is none; name a run's folder or RUN/checkpoints/step-XXXXXXXX (what "
            "`fewstep export` writes has none)"
        )
    folder = run_of(init)
    if not holds_run(folder):
        print(f"init: {folder} has no config.yaml of a run: whether its student is of this teacher, in {config.steps} steps, is not known")
        return
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if saved.get("steps", config.steps) != config.steps:
        raise UserError(f"init: the student of {folder} has {saved['steps']} steps, this run {config.steps}; set --steps {saved['steps']}")
    teacher, hashed = str(saved.get("teacher")), (folder / TEACHER_FILES).is_file()
    changed = changed_since(source, folder)
    other = not hashed and is_another_commit(teacher, source)  # one of the hub has no hashes
    if changed or other:
        why = f"its {changed} is not that of {source}" if changed else f"not {source}"
        same_name = other and hub.split(teacher)[0] == hub.split(source)[0]
        way = f"give --teacher {teacher}, that commit of it" if same_name else "begin with one of this teacher"
        if changed:
            way += f", or, {SAVED_AGAIN.format(folder / TEACHER_FILES)}"
        raise UserError(f"init: the student of {folder} is of another teacher, {teacher}: {why}; {way}")
    if teacher != config.teacher and not (hashed and Path(source).is_dir()):
        print(f"init: the student of {folder} is of the teacher {teacher}: whether that is {source} is not known")


def check_same_teacher(source: str, run: Path) -> None:
    """Raises UserError for a teacher whose files are not those that the run in a folder began with, where it is known."""
    changed = changed_since(source, run)
    if changed:
        raise UserError(
            f"resume: {source} is not the teacher that this run began with, for its {changed} has changed; give that one back, or begin "
            f"anew with another --output; {SAVED_AGAIN.format(run / TEACHER_FILES)}"
        )


def changed_since(source: str, run: Path) -> str | None:
    """The first file of a teacher's folder, of weights or a configuration, that is not what it was when the run began (of configurations
    see `models.same_configuration`); None where all are, or it is not known: the record was deleted, or the teacher is of the hub, at a
    commit. Raises UserError for hashes that cannot be read.
    """
    kept, folder = run / TEACHER_FILES, Path(source)
    if not kept.is_file() or not folder.is_dir():
        return None
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise UserError(
            f"{kept}: cut off, or no hashes of a teacher's weights ({error}); put it back as it was. Without it nobody knows whether "
            f"{source} is the teacher that the run began with: if you do, delete it"
        ) from error
    now = models.weights_in(folder) | models.configurations_in(folder)
    return next((name for name in sorted(before | now) if not models.same_configuration(before.get(name), now.get(name))), None)


def check_record(path: Path) -> None:
    """Raises UserError for a run's record of its rewards' versions that cannot be read."""
    try:
        sources.told_so_far(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cut off, or no record of rewards ({error}); put it back as it was, or move it away: a new one is begun, and whether "
            "a reward has changed until now is not known"
        ) from error


def is_another_commit(teacher: str, source: str) -> bool:
    """Whether a run's teacher and `source` are both of the hub and not one; of a teacher whose commit an earlier version did not write that
    is not known."""
    began = hub.parts(teacher)
    if began is None or hub.COMMIT.fullmatch(began[1] or "") is None or hub.parts(source) is None:
        return False
    return teacher != source


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint itself, and not that of a run."""
    return (folder / "manifest.json").is_file()


def run_of(init: Path) -> Path:
    """The folder of the run that `init` names, or whose checkpoint it names; of one that lies elsewhere, that one's own."""
    path = init.absolute()
    return path.parent.parent if is_checkpoint(init) and path.parent.name == "checkpoints" else init


def holds_run(output: Path) -> bool:
    """Whether a folder holds a run of fewstep: other programs write a config.yaml too."""
    import yaml

    try:
        saved = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(saved, dict) and {"student", "fake", "matching"} <= saved.keys()


def check_spared(config: Config) -> None:
    """Raises UserError naming the first field that reads from what `--overwrite` deletes."""
    output = Path(config.output)
    held = [path for path in run_files(output) if path.exists()]
    read = {"teacher": config.teacher, "discriminator.latents": config.discriminator.latents}
    read |= {f"{kind}.{name}": source for kind in ("scorer", "judge") for name, source in getattr(config, kind).items()}
    if not keeps_prompts(config):
        read["prompts"] = config.prompts
    for field, source in read.items():
        path = Path(str(source)).resolve()
        deleted = any(is_one(at, each) for at in (path, *path.parents) for each in held)
        if path.exists() and (deleted or (is_one(path, output) and field == "teacher" and source != "world")):
            raise UserError(f"overwrite: {field} is {source}, among what --overwrite deletes in {config.output}; name another --output")


def is_given(prompts: str | None) -> bool:
    """Whether these are a list that was given to a run, which lies in its folder."""
    return prompts is not None and Path(prompts).name == GIVEN


def keeps_prompts(config: Config) -> bool:
    """Whether the prompts are those that lie in the run's own folder: a run writes them there again."""
    return config.prompts is not None and Path(config.prompts).resolve() == (Path(config.output) / GIVEN).resolve()


def is_linked(path: Path) -> bool:
    """Whether it is a link to a folder, as to one on a larger disk."""
    return path.is_symlink() and path.is_dir()


def check_links(output: Path) -> None:
    """Raises UserError naming a part of a run that is a link to a folder which is not empty: it may hold what fewstep did not write."""
    for path in run_files(output):
        if is_linked(path) and any(path.iterdir()):
            raise UserError(
                f"overwrite: {path} is a link to {path.resolve()}, and nothing outside of {output} is deleted; empty that folder, or "
                "remove the link"
            )


def remove_run(output: Path) -> None:
    """Deletes what fewstep wrote into a run's folder, nothing else; a link to a folder, empty by now, is where the next run writes."""
    for path in run_files(output):
        if is_linked(path):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_same_run(config: Config, path: Path) -> None:
    """Raises UserError naming the first field, dotted, in which the config differs from the saved one and may not."""
    import yaml

    def values(plain: dict[str, Any]) -> dict[str, Any]:
        # a server may have moved; its version is what counts, and `rewards.json` has it
        scorers = {name: "a server" if is_remote(value) else value for name, value in (plain.get("scorer") or {}).items()}
        # so may the file of prompts; the checkpoint knows which they were
        prompts = plain.get("prompts") and "a file"
        return as_values(plain | {"scorer": scorers, "prompts": prompts})

    # a field that an earlier version did not have is as it is by default
    before, now = values(as_plain(Config())) | values(yaml.safe_load(path.read_text(encoding="utf-8"))), values(as_plain(config))
    if (path.parent / TEACHER_FILES).is_file() and "world" not in (before["teacher"], config.teacher) and Path(config.teacher).is_dir():
        before["teacher"] = now["teacher"]  # a folder may have moved: its weights are looked at (`carry_out`)
    for name in before | now:
        if {name, name.partition(".")[0]}.isdisjoint((*FREE_ON_RESUME, *OF_A_CALL)) and (
            name not in before or name not in now or before[name] != now[name]
        ):
            was, is_now = (repr(held[name]) if name in held else "not given" for held in (before, now))
            free = ", ".join(FREE_ON_RESUME)
            ranges = [isinstance(held.get("matching.guidance"), list) for held in (before, now)]  # which adds to the networks
            same = name in SAME_FOR_INIT or (name == "matching.guidance" and len(set(ranges)) > 1)
            other = "" if same else f"; with others a new run may begin from it, --init {as_word(path.parent)} --output NEW"
            raise UserError(f"resume: {name} is {is_now}, the run in {path.parent} has {was}; only {free} may change{other}")
