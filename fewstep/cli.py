"""Command line, and the composition root: `build(config)` makes every object of a run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.config import Config

HELP = """usage: fewstep COMMAND [OPTIONS]

Distil a diffusion model into a few-step generator, with distribution matching as a reward.

commands:
  distill [RECIPE]        make a few-step student; with no argument: the embedded teacher, GNDM, 4 steps;
                          RECIPE is a YAML file, or a method: dmd, dmd2, gndm, dmdr, gndmr, gndmr-1, gndmr-4, gndm-is,
                          gndmr-is; or a family's teacher: sd, sdxl, sd3, flux, flux2, sana, pixart, z_image, qwen_image
                          (with --teacher, what is not set is as in its family's)
  sample FOLDER           draw pictures with a student
  models                  list the model families and what each supports
  export FOLDER           write a student as a diffusers folder, a LoRA or a file for ComfyUI; push it to the hub
  evaluate FOLDER         measure a student beside its teacher
  compare                 recipes x seeds on the embedded world at equal network evaluations, as one table
  rewards                 the named rewards: what they score, licences, range, memory
  serve-reward NAME       one reward behind HTTP, for an environment or a GPU of its own
  convert-reward NAME     a reward's published pickle into safetensors, once

`fewstep COMMAND --help` lists a command's options; `fewstep --version` prints the version."""

RUN_FILES = (
    "checkpoints", "samples", "tensorboard", "config.yaml", "rewards.json", "metrics.jsonl", "samples.png", "evaluation.json",
    "evaluation", "README.md", "export", "model_index.json", "unet", "transformer", "vae", "text_encoder", "text_encoder_2",
    "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "feature_extractor", "pytorch_lora_weights.safetensors",
)  # fmt: skip
# what may differ between a run and its continuation
FREE_ON_RESUME = ("updates", "teacher_guidance", "save_every", "sample_every", "evaluate", "resume", "overwrite", "dry_run", "output",
                  "device", "judge", "remote")  # fmt: skip


class UserError(Exception):
    """A mistake in what the user gave; its message is all they need to see. Exit code 2."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("fewstep"))
        return 0
    commands = {
        "distill": distill_command, "sample": sample_command, "export": export_command, "evaluate": evaluate_command,
        "compare": compare_command, "models": models_command, "rewards": rewards_command, "serve-reward": serve_reward_command,
        "convert-reward": convert_reward_command,
    }  # fmt: skip
    if arguments[0] not in commands:
        return complain(f"unknown command {arguments[0]!r}{nearest(arguments[0], commands)}")
    try:
        return commands[arguments[0]](arguments[1:])
    except UserError as error:
        return complain(str(error))
    except ValueError as error:
        if type(error).__name__ != "RewardError":  # its module imports torch, which --help must not
            raise
        return complain(f"{error}. Nothing was updated with it; go on from the last checkpoint with --resume", code=1)
    except FloatingPointError as error:  # nothing was updated or saved after it: the last checkpoint is the state to go on from
        return complain(f"{error}. Lower student.lr or fake.lr, or go on from the last checkpoint with --resume", code=1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        first = ". ".join(str(error).split(". ")[:2])  # what was asked for; torch goes on about its allocator
        return complain(f"{first}. {SMALLER.get(arguments[0], '')}".strip(), code=1)


SMALLER = {  # what takes less of a device's memory, by command
    "distill": "`fewstep distill ... --dry-run` says what a run needs; --memory.micro-groups 1, --memory.checkpointing, --lora-rank 64 and "
    "--memory.optimizer adamw8bit take less. What was saved is whole",
    "evaluate": "A smaller --batch takes less; what was drawn is kept",
}


def complain(message: str, *, code: int = 2) -> int:
    print(f"fewstep: error: {message}", file=sys.stderr)
    return code


def nearest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"


# -- distill -----------------------------------------------------------------------------------------------------------


def field_names(config: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> type of every field of a config class; a group of fields comes as itself and with its members."""
    import typing

    names: dict[str, type] = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        names[prefix + field.name] = kind
        if dataclasses.is_dataclass(kind):
            names |= field_names(kind, f"{prefix}{field.name}.")
    return names


# fields that are tables: the user names their keys
TABLES = ("reward", "via", "scorer", "judge")
ONLY_BY_FLAG = "a file runs no code here: leave it out and give your own flag, --{} {}"
OWN_JUDGE = "One of your own: --judge.{} path/to/file.py:function, or a server's address"
HELD_OUT = "held-out"  # a judge's source: the embedded world's own twin of the reward with its name


def in_table(name: str) -> bool:
    table, _, key = name.partition(".")
    return table in TABLES and bool(key) and "." not in key


def normalise(arguments: list[str], names: dict[str, type]) -> list[str]:
    """Flags as the parser knows them: underscores, `--config` before a recipe, a value for a bare switch; unknown ones are refused."""
    out: list[str] = []
    arguments = spell_out(arguments)
    for i, argument in enumerate(arguments):
        if not argument.startswith("--"):
            is_value = i > 0 and arguments[i - 1].startswith("--") and "=" not in arguments[i - 1]
            out += [argument] if is_value else ["--config", recipe_path(argument)]
            continue
        flag, equals, value = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if in_table(name):
            name = f"{name.partition('.')[0]}.{flag.partition('.')[2]}"  # a key is the user's own word
        elif name not in names and name not in ("help", "config"):
            raise UserError(f"--{flag}: unknown option{nearest(name, names)}")
        if name == "config" and equals:
            out += ["--config", recipe_path(value)]
            continue
        out.append(f"--{name}{equals}{value}")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if name.startswith("judge.") and not equals and following.startswith("--"):
            out[-1] += "=null"  # its own source
        if names.get(name) is bool and not equals and following.lower() not in ("true", "false"):
            out.append("true")
    return as_lists_of_sizes(out)


def as_lists_of_sizes(arguments: list[str]) -> list[str]:
    """`--size 1024x768,768x1024` as the list that it is; the config says what is no size."""
    out: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.rpartition("=") if argument.startswith("--size=") else ("", "", argument)
        is_size = not value.startswith(("[", "--")) and (equals or out[-1:] == ["--size"])
        out.append(f"{flag}{equals}{json.dumps(value.split(','))}" if is_size else argument)
    return out


def spell_out(arguments: list[str]) -> list[str]:
    """`--reward.NAME path/to/file.py:function` or a server's address as what it is short for: weight 1, and the scorer."""
    from fewstep.rewards.sources import is_code, is_remote

    out: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--") and out and out[-1].startswith("--reward.") and "=" not in out[-1]:
            flag, equals, value = out.pop(), "=", argument
            argument = f"{flag}={value}"
        if flag.startswith("--reward.") and equals and (is_code(value) or is_remote(value)):
            name = flag.removeprefix("--reward.")
            out += [f"--reward.{name}=1", f"--scorer.{name}={value}"]
        else:
            out.append(argument)
    return out


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


def recipe_path(argument: str) -> str:
    """A recipe's file: the one given, or the named one that ships with fewstep."""
    named = Path(__file__).parent / "recipes" / f"{argument}.yaml"
    if Path(argument).exists() or not argument.replace("-", "_").isidentifier():
        return argument
    if not named.is_file():
        raise UserError(f"{argument}: no such file or recipe{nearest(argument, recipe_names())}")
    return str(named)


def check_recipe(path: Path, names: dict[str, type]) -> None:
    """Unknown keys of a YAML recipe, and code in it, by file and key, before anything else is parsed."""
    import yaml

    from fewstep.rewards.sources import is_code

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start + 1})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        held = "nothing" if recipe is None else "a list" if isinstance(recipe, list) else f"only {recipe!r}"
        raise UserError(f"{path}: a recipe is a list of `key: value` lines, this holds {held}")

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name not in names and not in_table(name):
                raise UserError(f"{path}: unknown key {name!r}{nearest(name, names)}")
            if in_table(name) and is_code(value):
                raise UserError(f"{path}: {name} names code, {value}; {ONLY_BY_FLAG.format(name, value)}")
            if isinstance(value, dict):
                walk(value, f"{name}.")

    walk(recipe, "")


WRONG_TYPE = re.compile(r"Parser key \"([\w.]+)\": .*?Expected an? (.+?)\. Got value: (.*)")
PAIR = "two numbers in brackets, as [0.9, 0.99]"
KINDS = {
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false",
    "<class 'tuple'>": PAIR, "tuple with 2 elements": PAIR,
}  # fmt: skip


def in_plain_words(message: str) -> str:
    """What the parser says of a value of the wrong type, without the names that types have in Python."""
    found = WRONG_TYPE.search(message)
    if found is None:
        return message.replace("Parser key", "key")
    key, kind, value = found.groups()
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    wanted = f"one of {choices[1].replace(chr(39), '')}" if choices else KINDS.get(kind, kind)
    return f"{key}: must be {wanted}; got {value}"


@functools.cache
def config_parser() -> Any:
    """Made once: to read the config's docstrings takes longer than to parse a run's flags."""
    import jsonargparse

    from fewstep.config import Config

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None):
            raise UserError(in_plain_words(" ".join(message.split()))) from ex

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fewstep distill", description="Distil a teacher into a few-step student.")
    parser.add_argument("--config", action="config", help="YAML recipe (the same keys)")
    parser.add_class_arguments(Config)
    return parser


def recipes_and_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The files after `--config`, and the other arguments."""
    recipes, flags, left = [], [], iter(arguments)
    for argument in left:
        if argument == "--config":
            recipes.append(next(left, ""))
        else:
            flags.append(argument)
    return recipes, flags


def read_config(arguments: list[str]) -> tuple[Config, list[str], list[str]]:
    """(the config that recipes and flags spell, its values not yet checked; the recipes; the flags).

    A recipe overrides those before it, a flag every recipe, wherever it stands. Raises UserError naming the flag, or the file and key.
    """
    from fewstep.config import Config

    names = field_names(Config)
    arguments = normalise(arguments, names)
    recipes, flags = recipes_and_flags(saved_recipe(arguments) + arguments)
    for recipe in recipes:
        check_recipe(Path(recipe), names)
    parser = config_parser()
    for recipe in recipes:  # alone first, so that a wrong type is blamed on the file that holds it
        try:
            parser.parse_args(["--config", recipe])
        except UserError as error:
            raise UserError(f"{recipe}: {error}") from error
    parsed = parser.instantiate(parser.parse_args([part for recipe in recipes for part in ("--config", recipe)] + flags))
    return Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)}), recipes, flags


def parse_config(arguments: list[str]) -> Config:
    """The config of a run from recipes and flags. Raises UserError naming the flag, or the file and key."""
    from fewstep.rewards.sources import is_code, settle_via

    config, recipes, flags = read_config(arguments)
    given = flag_values(flags)
    for table in ("scorer", "judge"):
        for key, value in getattr(config, table).items():
            name = f"{table}.{key}"
            if is_code(value) and given.get(f"--{name}") != value:  # however a recipe may have spelt it
                raise UserError(f"{', '.join(recipes) or f'--{table}'}: {name} names code, {value}; {ONLY_BY_FLAG.format(name, value)}")
    try:
        config = settle_via(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = config.problems()
    if problems:
        raise UserError("; ".join(problems))
    return config


def on_family_recipe(arguments: list[str]) -> list[str]:
    """A run's flags and recipes on top of the recipe of its teacher's family; says in one line what that one decides.

    The embedded teacher has the defaults, and a run that goes on its own config. A teacher that cannot be read is refused later.
    """
    from fewstep import models

    config, *_ = read_config(arguments)
    if config.teacher == "world" or config.resume:
        return arguments
    try:
        name = models.family_name(models.pipeline_class(config.teacher))
    except models.UnsupportedTeacher:
        return arguments
    whole = [str(Path(__file__).parent / "recipes" / f"{name}.yaml"), *arguments]
    before, now = (as_values(as_plain(each)) for each in (config, read_config(whole)[0]))
    changed = ", ".join(f"{key} {now[key]}" for key in now if now[key] != before[key])
    if changed:
        print(f"what you did not set is as in the recipe {name}, which is not measured: {changed}")
    return whole


def as_values(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of what a nested dictionary holds."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= as_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def saved_recipe(arguments: list[str]) -> list[str]:
    """A run that goes on starts from its own saved config; flags given now come after it."""
    if "--resume" not in arguments and "--resume=true" not in arguments:
        return []
    path = Path(flag_values(arguments).get("--output", "out")) / "config.yaml"
    return ["--config", str(path)] if path.is_file() else []


def flag_values(arguments: list[str]) -> dict[str, str]:
    """What follows each flag, the last one winning."""
    return dict(itertools.pairwise([*arguments, ""])) | dict(a.split("=", 1) for a in arguments if "=" in a)


def as_arguments(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested keyword arguments as the flags that say the same."""
    out: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            out += as_arguments(value, f"{prefix}{key}.")
        elif value is not None:
            out.append(f"--{prefix}{key}={json.dumps(value) if isinstance(value, (bool, list, tuple)) else value}")
    return out


def check_output(config: Config) -> None:
    """An output folder that may be written. Raises UserError."""
    import shutil

    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file; name a folder")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    is_run = "config.yaml" in held
    if config.resume and not is_run:
        raise UserError(f"resume: {output} holds no run to go on with")
    if held and not is_run:
        raise UserError(f"output: {output} is not empty and holds no run (it has {held[0]!r}); name another folder")
    if is_run and not (config.resume or config.overwrite):
        raise UserError(f"output: {output} already holds a run; add --resume to go on, --overwrite to start anew, or name another --output")
    if config.resume:
        check_same_run(config, output / "config.yaml")
    if config.overwrite:
        for name in RUN_FILES:  # what fewstep wrote, nothing else
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output: cannot write to {output} ({error.strerror})") from error


def check_same_run(config: Config, path: Path) -> None:
    import yaml

    from fewstep.config import Config
    from fewstep.rewards.sources import is_remote

    # a field that an earlier version did not have is as it is by default
    before, now = as_plain(Config()) | yaml.safe_load(path.read_text()), as_plain(config)
    for held in (before, now):  # a server may have moved; its version is what counts, and `rewards.json` has it
        held["scorer"] = {name: "a server" if is_remote(value) else value for name, value in (held.get("scorer") or {}).items()}
    changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key) != now[key]]
    if changed:
        was, free = before.get(changed[0]), ", ".join(FREE_ON_RESUME[:4])
        raise UserError(f"resume: {changed[0]} is {now[changed[0]]!r}, the run in {path.parent} has {was!r}; only {free} may change")


def as_plain(config: Config) -> dict[str, Any]:
    """The config as YAML and JSON hold it: without the code that it named, which no file may."""
    from fewstep.rewards.sources import is_code

    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    for table in ("scorer", "judge"):
        plain[table] = {name: value for name, value in plain[table].items() if not is_code(value)}
    return plain


def read_prompts(config: Config) -> list[str]:
    from fewstep import prompts, world

    if config.prompts is not None:
        try:
            return prompts.read(config.prompts)
        except prompts.BadPrompts as error:
            raise UserError(f"prompts: {error}") from error
    if config.teacher != "world":
        raise UserError("prompts: missing; give a text file with one prompt a line (only the embedded teacher brings its own)")
    return world.prompts("train")


def resolve_teacher(name: str) -> str:
    """Folder or hub id of a teacher; `world` is the embedded one. Raises UserError, before torch is imported."""
    from fewstep import export, models

    source = export.teacher_source(name)
    try:
        models.pipeline_class(source)
    except models.UnsupportedTeacher as error:
        raise UserError(f"teacher: {error}") from error
    return source


def resolve_hardware(config: Config) -> Config:
    """The config with `auto` replaced by what this machine has."""
    import torch

    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        if torch.device(device).type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # older torch cannot say
            abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            native = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    memory = config.memory
    if memory.frozen == "auto":
        memory = dataclasses.replace(memory, frozen="bf16" if precision == "bf16" and torch.device(device).type == "cuda" else "fp32")
    if memory.frozen == "bf16" and precision != "bf16":
        raise UserError(f"memory.frozen: bf16 is for arithmetic in bf16, and precision is {precision}")
    return dataclasses.replace(config, device=device, precision=precision, memory=memory)


@dataclasses.dataclass
class Run:
    """Everything `build` made."""

    config: Config
    backbone: Any
    roles: Any
    trainer: Any


def assets(config: Config) -> Path | None:
    """The embedded world's, for a run on its teacher: its rewards know no other pictures."""
    from fewstep import world

    return world.ASSETS if config.teacher == "world" else None


def check_rewards(config: Config, functions: dict[str, Any]) -> dict[str, Any]:
    """The caller's functions with those that flags name and with the servers, which are asked who they are.

    Raises UserError, before anything slow, for a reward that nobody can make; hub ids in `config.scorer` get their commit.
    """
    from fewstep.rewards import REWARDS, sources

    found = dict(functions)
    for name in config.reward:
        scorer = config.scorer.get(name)
        if name in functions or name == "discriminator":
            continue
        try:
            if sources.is_code(scorer):
                found[name] = sources.load_function(scorer)
            elif sources.is_remote(scorer):
                from fewstep.rewards.remote import Remote

                found[name] = Remote(scorer, name, timeout=config.remote.timeout).connect()
            elif name in REWARDS:
                located = sources.locate(name, scorer, assets=assets(config))
                if scorer is not None:
                    config.scorer[name] = located
            else:
                known = [*REWARDS, "discriminator"]
                raise UserError(f"reward.{name}: unknown reward{nearest(name, known)}. {sources.own_hint(name, resume=config.resume)}")
        except ValueError as error:
            raise UserError(f"{'reward' if scorer is None else 'scorer'}.{name}: {error}") from error
    latents = config.discriminator.latents
    if "discriminator" in config.reward and (latents is None and config.teacher != "world"):
        raise UserError(
            "discriminator.latents: give a safetensors file with latents of real pictures (only the embedded world brings its own)"
        )
    if latents is not None and not Path(latents).is_file():
        raise UserError(f"discriminator.latents: {latents}: no such file")
    return found


def check_judges(config: Config, functions: dict[str, Any]) -> dict[str, Any]:
    """The caller's own judges with those that flags name, as functions of pictures and prompts; the named ones are built with the run.

    Raises UserError, before anything slow, for one that nobody can make, and for a judge that is what the student is trained on.
    """
    from fewstep.rewards import REWARDS, sources

    found = dict(functions)
    if functions and not config.reward:
        raise UserError("judge: nothing to judge: add a reward")
    for name, source in config.judge.items():
        if name in functions:
            continue
        try:
            if sources.is_code(source) or sources.is_remote(source):
                if source == config.scorer.get(name):
                    raise ValueError(f"{source} is what the student is trained on; a judge is held out")
                found[name] = sources.open_judge(name, source, timeout=config.remote.timeout)
            elif source == HELD_OUT:
                from fewstep import world

                if assets(config) is None:
                    raise ValueError(
                        f"only the embedded world has {HELD_OUT} twins of its own; give a folder or hub id, a function, a server"
                    )
                world.held_out(name)
            elif name in REWARDS:
                located = sources.locate(name, source, assets=assets(config), flag=f"--judge.{name}")
                if name in config.reward and located == sources.locate(name, config.scorer.get(name), assets=assets(config)):
                    raise ValueError(f"{located} is what the student is trained on; a judge is held out")
                if source is not None:
                    config.judge[name] = located
            else:
                raise UserError(f"judge.{name}: unknown reward{nearest(name, REWARDS)}. {OWN_JUDGE.format(name)}")
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
    return found


def server_of(function: Any) -> Any:
    """The Remote that a reward or a judge is or that its function belongs to; None where there is no server."""
    from fewstep.rewards.remote import Remote

    holder = getattr(function, "__self__", function)
    return holder if isinstance(holder, Remote) else None


def make_judges(config: Config, functions: dict[str, Any]) -> dict[str, Any]:
    """Functions of (images, prompts) by judge. Raises UserError."""
    from fewstep import world
    from fewstep.rewards import sources

    judges = dict(functions)
    for name, source in config.judge.items():
        if name in functions:
            continue
        try:
            if source == HELD_OUT:
                judges[name] = world.held_out(name, device=config.device)
            else:
                judge = sources.open_judge(name, source, assets=assets(config), device=config.device)
                judges[name] = getattr(judge, "score", judge)
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
    return judges


def make_terms(config: Config, roles: Any, functions: dict[str, Any]) -> dict[str, Any]:
    """The reward terms beside R_dm, by name."""
    import torch

    from fewstep import world
    from fewstep.cost import Counted
    from fewstep.rewards import sources
    from fewstep.rewards.base import as_reward
    from fewstep.trainer import Term

    terms = {}
    for name in config.reward:
        via = config.via.get(name, "pathwise")
        if name in functions:
            terms[name] = Term(Counted(as_reward(functions[name], name)), via=via)
        elif name == "discriminator":
            from safetensors.torch import load_file

            from fewstep.rewards.discriminator import Discriminator, Head

            if config.discriminator.latents is None:
                held = load_file(world.ASSETS / "latents.safetensors")
                real = held["latents"][~held["heldout"]]
            else:
                real = load_file(config.discriminator.latents)["latents"]
            with torch.no_grad():
                zero = torch.zeros(1, *real.shape[1:], device=config.device)
                width = roles.teacher.features(zero, torch.ones(1, device=config.device), roles.teacher.uncond).shape[1]
            head = Head(width).to(config.device)
            own = config.fake
            terms[name] = Term(
                Discriminator(roles.teacher, head, real.float().to(config.device), t_range=config.matching.t_range),
                dict(head.named_parameters()), lr=config.discriminator.lr, decay=own.decay,
                betas=own.betas, updates=own.updates, max_norm=own.max_norm,
            )  # fmt: skip
        else:
            try:
                source = sources.locate(name, config.scorer.get(name), assets=assets(config))
                scorer = sources.build(name, source, device=config.device)
            except (OSError, ValueError) as error:
                raise UserError(f"scorer.{name}: {error}") from error
            terms[name] = Term(Counted(scorer), via=via)
    return terms


def check_backbone(backbone: Any, config: Config) -> tuple[Any, list[tuple[int, int, int]]]:
    """(times, latent shapes) of a run. Raises UserError naming the key that this teacher, or what is installed, cannot do."""
    from fewstep.trainer import optimizer_class

    key = "steps"
    try:
        times = backbone.times(config.steps)
        key = "size"
        latent_shapes = [backbone.latent_shape(size) for size in config.sizes()]
        key = "teacher"
        backbone.check_guidance(config.matching.guidance)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    try:
        optimizer_class(config.memory.optimizer)
    except ImportError as error:
        raise UserError(str(error)) from error
    return times, latent_shapes


def build(
    config: Config, prompts: list[str], source: str, functions: dict[str, Any] | None = None, judges: dict[str, Any] | None = None
) -> Run:
    """Make teacher, student, fake, rewards and trainer from a config. Deterministic given `config.seed`.

    functions: rewards of the caller's own, by the name that `config.reward` weighs them under; judges: held-out ones, by name.
    """
    import torch

    from fewstep import models
    from fewstep.cost import Counted
    from fewstep.prompts import Batches
    from fewstep.rewards.distribution import DistributionMatching
    from fewstep.student import Student
    from fewstep.trainer import Term, Trainer
    from fewstep.weights import Adaptive, Fixed

    config = resolve_hardware(config)
    device = config.device
    torch.manual_seed(config.seed)
    try:
        backbone = models.load(source, device=device, dtype=models.frozen_dtype(config))
    except models.UnsupportedTeacher as error:
        raise UserError(f"teacher: {error}") from error
    times, latent_shapes = check_backbone(backbone, config)  # before the prompts are encoded, which may take hours
    conditioned = config.fake.condition == "step" and config.steps > 1
    guidance = config.matching.guidance
    backbone.prepare(prompts)
    try:
        roles = backbone.roles(
            lora_rank=config.lora_rank, fake_steps=config.steps if conditioned else 0, guidance=guidance,
            checkpointing=config.memory.checkpointing, int8_teacher=config.memory.teacher == "int8", compiled=config.compile,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error
    except ImportError as error:
        raise UserError(str(error)) from error
    inside = dataclasses.asdict(config.matching) | {"guidance": guidance if backbone.embedded_guidance is None else 1.0}
    schedule = backbone.schedule()
    matching = DistributionMatching(roles.teacher, roles.fake, schedule, **inside, step_condition=conditioned)
    fake = config.fake
    term = Term(
        matching, roles.fake_parameters, lr=fake.lr, decay=fake.decay, betas=fake.betas, updates=fake.updates,
        max_norm=fake.max_norm, anchor=True,
    )  # fmt: skip
    own = config.weights
    weights = Fixed(config.reward)
    if own.mode == "adaptive":
        weights = Adaptive(config.reward, own.budget, own.warmup, eta=own.eta, cap=own.cap, lag_limit=own.lag_limit)
    others, decoder = make_terms(config, roles, functions or {}), Counted(backbone.decode)
    held_out = make_judges(config, judges or {})
    asked = {**(functions or {}), **{f"judge.{name}": judge for name, judge in held_out.items()}}
    counted = {"student": roles.student, "teacher": roles.teacher, "fake": roles.fake, "decoder": decoder}
    trainer = Trainer(
        Student(roles.student, schedule, times),
        roles.student_parameters,
        {"dm": term, **others},
        Batches(prompts, config.groups, config.group_size, seed=config.seed),
        encode=backbone.encode,
        decode=decoder,
        latent_shapes=latent_shapes,
        config=config,
        device=device,
        weights=weights,
        counted=counted | {name: other.reward for name, other in others.items() if isinstance(other.reward, Counted)},
        judges=held_out,
        news={name: server.news for name, function in asked.items() if (server := server_of(function)) is not None},
    )
    return Run(config, backbone, roles, trainer)


def distill_command(arguments: list[str]) -> int:
    return distill(parse_config(on_family_recipe(arguments)))


def distill(config: Config, functions: dict[str, Any] | None = None, judges: dict[str, Any] | None = None) -> int:
    """Check, train, export, measure. functions, judges: rewards and judges of the caller's own. Returns the exit code."""
    prompts = read_prompts(config)
    functions = check_rewards(config, functions or {})
    judges = check_judges(config, judges or {})
    source = resolve_teacher(config.teacher)
    if config.dry_run:
        return dry_run(config, source, len(prompts))
    check_output(config)
    import yaml

    output = Path(config.output)
    from fewstep import checkpoint, models
    from fewstep.rewards import sources

    models.quiet_libraries()

    state = None
    if config.resume:
        try:
            found = checkpoint.newest(output / "checkpoints")
        except checkpoint.DamagedCheckpoint as error:
            raise UserError(f"resume: {error}") from error
        if found is None:
            print("no checkpoint was saved yet: starting from update 0")
        else:
            folder, state = found
            print(f"going on from {folder.name}")
    run = build(config, prompts, source, functions, judges)
    config = run.config
    print(f"training on {config.device} in {config.precision}")
    cut = run.backbone.cut(prompts)
    if cut:
        print(f"{len(cut)} of {len(prompts)} prompts are longer than the text encoder reads and are cut, the first: {cut[0]!r}")
    if state is not None:
        try:
            run.trainer.load_state(state)
        except checkpoint.DamagedCheckpoint as error:
            raise UserError(f"resume: {error}") from error
    kept = as_plain(config) | {"resume": False, "overwrite": False}  # of this call, not of the run
    (output / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    told = sources.records(config.reward, config.scorer, functions, assets=assets(config))
    told |= {f"judge.{name}": record for name, record in judge_records(config, judges).items()}
    for line in sources.write_records(output / "rewards.json", told, run.trainer.update):
        print(line)
    if not train(run, output, prompts):
        return 130
    finish(run, output, source, prompts)
    return 0


def judge_records(config: Config, functions: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Where each judge of a run comes from and in which version."""
    from fewstep import world
    from fewstep.rewards import sources

    own = [name for name, source in config.judge.items() if source == HELD_OUT and name not in functions]
    twins = {name: {"source": f"the embedded world's, {HELD_OUT}", "version": sources.version(str(world.TWINS[name]))} for name in own}
    named = {name: source for name, source in config.judge.items() if source is not None}
    others = [name for name in dict.fromkeys([*config.judge, *functions]) if name not in own]
    return twins | sources.records(others, named, functions, assets=assets(config))


def dry_run(config: Config, source: str, prompts: int) -> int:
    """Print what the run would need. Nothing is read but configurations, nothing is written."""
    from fewstep import models

    models.quiet_libraries()
    from fewstep import needs

    config = resolve_hardware(config)
    try:
        check_backbone(needs.skeleton(source, models.frozen_dtype(config)), config)
        print(needs.report(source, config, prompts))
    except ValueError as error:
        raise UserError(f"teacher: {error}") from error
    return 0


def grid_prompts(config: Config, prompts: list[str]) -> list[str]:
    from fewstep import world

    return world.prompts("grid") if config.teacher == "world" and config.prompts is None else prompts[:8]


def train(run: Run, output: Path, prompts: list[str]) -> bool:
    """Run the trainer behind a progress bar. False when it was stopped before the last update."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    stopping: list[int] = []

    def ask_to_stop(number: int, frame: Any) -> None:
        if stopping:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        stopping.append(number)
        print("\nstopping: saving at the end of this update", flush=True)

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer, config = run.trainer, run.config
    text = TextColumn("R_dm {task.fields[score]}  lag {task.fields[lag]}  {task.fields[rate]} updates/s")
    columns = (TextColumn("distilling"), BarColumn(bar_width=20), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("", total=config.updates, completed=trainer.update, score="-", lag="-", rate="-")
            seconds = 0.0
            for logs in trainer.run(output, stop=lambda: bool(stopping)):
                running = trainer.running
                seconds = logs["seconds"] if not seconds else seconds + 0.1 * (logs["seconds"] - seconds)
                shown = {
                    "score": f"{running.get('dm/score', float('nan')):.3g}",
                    "lag": f"{running.get('dm/lag', float('nan')):+.4f}",
                    "rate": f"{1 / seconds:.2f}",
                }
                bar.update(task, completed=trainer.update, **shown)
                if not bar.console.is_terminal and trainer.update % 20 == 0:
                    print(
                        f"update {trainer.update}/{config.updates}  R_dm {shown['score']}  lag {shown['lag']}  {shown['rate']} updates/s",
                        flush=True,
                    )
                if config.sample_every and trainer.update % config.sample_every == 0 and trainer.update < config.updates:
                    draw_progress(run, output, grid_prompts(config, prompts))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping and trainer.update < config.updates:
        print(f"stopped at update {trainer.update} of {config.updates}; saved. Go on with: fewstep distill --output {output} --resume")
        return False
    return True


SAMPLES_PER_PROMPT = 3


def sample_grid(pipe: Any, prompts: list[str], *, steps: int, call: dict[str, Any]) -> Any:
    """(P, N, 3, H, W) in [0, 1]: the grid's samples, N for each prompt, always with the same noise.

    call: what the pipeline is told beside.
    """
    from fewstep.evaluate.protocol import generate

    images, _ = generate(pipe, prompts, SAMPLES_PER_PROMPT, steps=steps, seed=0, call=call)
    return images.view(len(prompts), SAMPLES_PER_PROMPT, *images.shape[1:])


def student_grid(run: Run, prompts: list[str], weights: dict[str, Any]) -> Any:
    """The grid of the student with the given (averaged) weights, drawn on the training's own network."""
    backbone, steps = run.backbone, run.config.steps
    student = backbone.drawing(run.roles.student, backbone.scheduler(steps), weights)
    with student as pipe:
        return sample_grid(pipe, prompts, steps=steps, call=backbone.student_call | backbone.told_size(run.config.sizes()[0]))


def teacher_grids(run: Run, prompts: list[str], best: str) -> dict[str, Any]:
    """Grids of the teacher at its many steps and, with the named solver, at the student's, by column title."""
    from fewstep import world
    from fewstep.evaluate import protocol

    backbone, steps = run.backbone, run.config.steps
    call = backbone.teacher_call(run.config.teacher_guidance) | backbone.told_size(run.config.sizes()[0])
    own = backbone.pipe.scheduler
    few = own if backbone.flow else protocol.solver(best, own.config)
    columns = {f"teacher, {world.TEACHER_STEPS} steps": (world.TEACHER_STEPS, own), f"teacher, {steps} steps ({best})": (steps, few)}
    grids = {}
    for title, (n, scheduler) in columns.items():
        with backbone.drawing(run.roles.teacher, scheduler) as pipe:
            grids[title] = sample_grid(pipe, prompts, steps=n, call=call)
    return grids


def draw_progress(run: Run, output: Path, prompts: list[str]) -> None:
    """A grid of the averaged student with fixed prompts and seeds; the training's random numbers are left untouched."""
    from fewstep.report import grid

    trainer, steps = run.trainer, run.config.steps
    title = f"student, {steps} steps, update {trainer.update}"
    images = student_grid(run, prompts, trainer.averaged())
    grid.save({title: images}, prompts, output / "samples" / f"update-{trainer.update:08d}.png")


def finish(run: Run, output: Path, source: str, prompts: list[str]) -> None:
    """Export the averaged student, measure it, draw it beside its teacher, write its card."""
    from fewstep import export
    from fewstep.report import grid

    for name in ("evaluation.json", "samples.png", "README.md"):  # of an earlier student
        (output / name).unlink(missing_ok=True)
    config, backbone, trainer = run.config, run.backbone, run.trainer
    weights = trainer.averaged()
    pipe = backbone.student_pipeline(run.roles, weights, config.steps)
    student = export.Averaged(config, backbone, pipe, weights, trainer.update, trainer.weights.now())
    export.write_diffusers(student, output)
    results, best = None, "DPM-Solver++" if not backbone.flow else "its own solver"
    if config.evaluate and config.teacher == "world":
        report = measure_student(
            output, source, config, output=output / "evaluation.json", steps=config.steps, guidance=config.teacher_guidance
        )
        assert report is not None
        results, best = export.results_markdown(report), next(r["solver"] for r in report["rows"] if r["name"] == report["best_solver"])
    elif config.evaluate:
        print(f"not measured: fewstep evaluate {output} --prompts FILE, with --extractor.NAME and --judge.NAME")
    shown = grid_prompts(config, prompts)
    columns = teacher_grids(run, shown, best) | {f"student, {config.steps} steps": student_grid(run, shown, weights)}
    grid.save(columns, shown, output / "samples.png")
    export.model_card(student, "diffusers", output, results=results).save(output / "README.md")
    print(f"student in {output}; look at {output / 'samples.png'}")


def models_command(arguments: list[str]) -> int:
    """Print the families and what each supports."""
    if arguments:
        if arguments[0] not in ("-h", "--help"):
            raise UserError(f"models: takes no arguments, got {arguments[0]!r}")
        print("usage: fewstep models\n\nList the model families and what each supports.")
        return 0
    from fewstep import models

    models.quiet_libraries()
    rows = [models.SUPPORT, *models.support()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nA teacher is a diffusers folder or a hub id of one of these pipelines; how to add one: docs/new-family.md")
    return 0


# -- evaluate ----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    import os

    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "evaluate"


def world_instruments(device: str) -> dict[str, Any]:
    """What `protocol.evaluate` is told where the teacher is the embedded one: its scorers, prompts, data, and its samples that ship."""
    from safetensors.torch import load_file

    from fewstep import world
    from fewstep.world.utility import gold_utility

    return {
        "prompts": world.prompts("evaluate"), "images_per_prompt": world.IMAGES_PER_PROMPT, "scorers": world.load_scorers(device=device),
        "extractor": "clip-heldout", "utility": gold_utility, "data": load_file(world.ASSETS / "features.safetensors")["heldout"].float(),
        "neighbours": world.NEIGHBOURS, "noise": "batch", "shipped": world.SAMPLES,
    }  # fmt: skip


def source_of(name: str, size: tuple[int, int] | None, *, device: str, precision: str, student: bool) -> Any:
    """What opens a pipeline to draw with, through its family: a student without guidance, a teacher with it."""

    def opened() -> Any:
        import torch

        from fewstep import models
        from fewstep.evaluate.protocol import Source

        backbone = models.load(name, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        told = backbone.told_size(size)

        def call(guidance: float) -> dict[str, Any]:
            return (backbone.student_call if student else backbone.teacher_call(guidance)) | told

        return Source(backbone.pipe.to(device), call, (told["height"], told["width"]))

    return opened


def measure_student(student: str | Path, teacher: str | None, config: Config | None, *, output: Path, **told: Any) -> dict[str, Any] | None:
    """Measure a student as `protocol.evaluate` is told; saves the report, prints its table and returns it, or None where only a share was
    drawn. config: of the student's run, where there is one; told: what the caller gives beside the embedded world's own."""
    from rich.console import Console

    from fewstep.evaluate import protocol

    device, precision = told.setdefault("device", evaluation_device()), told.setdefault("precision", "fp32")
    size = config.sizes()[0] if config else None
    opening = {"device": device, "precision": precision}
    own = world_instruments(device) if teacher == str(resolve_teacher("world")) else {"noise": "picture", "scorers": {}}
    told = own | told | {"scorers": own["scorers"] | told.get("scorers", {})}
    report = protocol.evaluate(
        source_of(str(student), size, student=True, **opening),
        teacher=source_of(teacher, size, student=False, **opening) if teacher else None,
        cache=cache_folder(),
        **told,
    )
    if report is not None:
        protocol.save(report, output)
        Console(width=None if sys.stdout.isatty() else 200).print(protocol.as_table(report))
    return report


def evaluation_device() -> str:
    """A GPU, each process of a torchrun its own, or the CPU."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def simple_parser(name: str, description: str) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UserError(message)

    parser = Parser(prog=f"fewstep {name}", description=description, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a student's folder")
    return parser


def check_student(folder: Path) -> None:
    """Raises UserError when the folder holds no finished student."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: holds no finished student (no model_index.json)")


def run_config(folder: Path) -> Config:
    """The config a student was made with. Raises UserError when the folder holds no finished student."""
    check_student(folder)
    return saved_config(folder)


def saved_config(folder: Path) -> Config:
    """The config of a run. Raises UserError when the folder holds none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run of fewstep (no config.yaml)")
    return parse_config([str(folder / "config.yaml")])


def table_flags(arguments: list[str], tables: tuple[str, ...]) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """(table -> key -> value of every --TABLE.KEY [VALUE], the other arguments)."""
    found: dict[str, dict[str, str | None]] = {table: {} for table in tables}
    rest, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        table, _, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and table in found and key):
            rest.append(argument)
            continue
        found[table][key] = value if equals else left.pop(0) if left and not left[0].startswith("--") else None
    return found, rest


def load_judges(named: dict[str, str | None], *, device: str, in_world: bool, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(judges that are a CLIP, by name; any other rewards as functions of pictures and prompts). Raises UserError naming the flag.

    timeout: as `remote.timeout` of a run.
    """
    from fewstep import world
    from fewstep.evaluate.measure import is_reserved
    from fewstep.rewards import REWARDS, sources
    from fewstep.rewards.clip import CLIPScore

    scorers, others = {}, {}
    for name, source in named.items():
        if is_reserved(name):
            raise UserError(f"judge.{name}: another number of the report has this name, or one like it; give the judge another")
        if name not in REWARDS and not (sources.is_code(source) or sources.is_remote(source)):
            raise UserError(f"judge.{name}: unknown reward{nearest(name, REWARDS)}. {OWN_JUDGE.format(name)}")
        try:
            judge = sources.open_judge(name, source, assets=world.ASSETS if in_world else None, device=device, timeout=timeout)
        except (OSError, ValueError) as error:
            raise UserError(f"judge.{name}: {error}") from error
        if isinstance(judge, CLIPScore):
            scorers[name] = judge
        else:
            others[name] = getattr(judge, "score", judge)
    return scorers, others


def share_of(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard i/n, or of a torchrun's processes. Raises UserError."""
    import os

    if text is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise UserError(f"--shard: i/n, the i-th of n shares counted from 0, as 0/4; got {text!r}")
    return int(i), int(n)


def evaluate_command(arguments: list[str]) -> int:
    from fewstep.config import Config, RemoteConfig

    tables, arguments = table_flags(arguments, ("extractor", "judge"))
    parser = simple_parser(
        "evaluate",
        "Measure a student beside its teacher: distances of features (--extractor.NAME [SOURCE]: inception, clip, or a name of your own "
        "for a vision model's folder or hub id or path/to/file.py:function), "
        "rewards as judges (--judge.NAME [SOURCE]), cost. See docs/evaluation.md.",
    )
    parser.add_argument(
        "--against", metavar="TEACHER", help="a diffusers folder, a hub id, world, or none (default: the run's own teacher)"
    )
    parser.add_argument("--data", metavar="FOLDER", help="real pictures: a folder, or owner/name[@revision][:split] on the hub")
    parser.add_argument("--prompts", metavar="FILE", help="prompts, one a line or as a set was published; a set's NAME; NAME=FILE")
    parser.add_argument("--images-per-prompt", type=int, help="pictures for each prompt (default: the set's; 8 in the embedded world)")
    parser.add_argument("--steps", type=int, help="the student's steps (default: those it was made for)")
    parser.add_argument("--teacher-steps", type=int, help="the teacher's own steps (default 28)")
    parser.add_argument("--guidance", type=float, help="the teacher's guidance scale (default: the run's, or its family's)")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="bring pictures to this square before an extractor sees them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows; the teacher's reference sample uses the next")
    parser.add_argument("--batch", type=int, default=16, help="pictures drawn at a time (default 16)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the pipelines")
    default = f"{RemoteConfig().timeout:g}"
    parser.add_argument(
        "--remote.timeout", dest="timeout", type=float, metavar="SECONDS", help=f"of a judge's server (default: the run's, or {default})"
    )
    parser.add_argument("--shard", metavar="I/N", help="draw only this share; a last call without it measures (torchrun does both)")
    parser.add_argument("--keep-images", type=Path, metavar="FOLDER", help="keep the pictures themselves too")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="REPORT", help="show other reports in one table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the report (default: evaluation.json in the student's folder)")
    options = parser.parse_args(arguments)
    folder, own = options.folder, options.folder.is_dir()
    if own:
        check_student(folder)
    elif folder.exists() or len(folder.parts) != 2 or not str(folder)[0].isalnum():
        raise UserError(f"{folder}: no such folder, and not a hub id (owner/name)")
    config: Config | None = saved_config(folder) if (folder / "config.yaml").is_file() else None
    for name in ("images_per_prompt", "steps", "teacher_steps", "resize", "batch"):
        if (getattr(options, name) or 1) < 1 or getattr(options, name) == 0:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(options, name)}")
    remote = (config or Config()).remote if options.timeout is None else RemoteConfig(options.timeout)
    if problems := Config(remote=remote).problems():
        raise UserError("; ".join(problems))
    against = options.against or (config.teacher if config else "none")
    teacher = None if against == "none" else resolve_teacher(against)
    steps = options.steps or (config.steps if config else steps_of(folder) if own else None)
    if steps is None:
        raise UserError("--steps: missing; the student does not say how many steps it was made for")
    share, launched = share_of(options.shard), options.shard is None
    others = {str(path): read_report(path) for path in options.beside}
    if options.prompts is None and against != "world":
        raise UserError("--prompts: missing; give a file, or the name of a set (only the embedded world brings its own)")
    if against != "world" and not (tables["extractor"] or tables["judge"]):
        raise UserError("nothing to measure with: give --extractor.NAME or --judge.NAME, as --extractor.inception or --judge.clip FOLDER")
    if options.data and against != "world" and not tables["extractor"]:
        raise UserError("--data: nothing to compare pictures by; give --extractor.NAME, as --extractor.inception")

    from fewstep import models
    from fewstep.evaluate import features, pictures, sets

    models.quiet_libraries()
    device = evaluation_device()
    told: dict[str, Any] = {"steps": steps, "seed": options.seed, "batch": options.batch, "device": device, "precision": options.precision}
    told |= {
        "teacher_steps": options.teacher_steps,
        "keep_images": options.keep_images,
        "work": folder / "evaluation" if own else cache_folder(),
    }
    try:
        if teacher is not None:
            default = config.teacher_guidance if config else models.family(teacher).default_guidance
            told["guidance"] = default if options.guidance is None else options.guidance
        if options.prompts is not None:
            told["prompts"] = sets.load(options.prompts)
            known = sets.SETS.get(told["prompts"].name)
            told["images_per_prompt"] = known.images_per_prompt if known else 1
        if options.images_per_prompt is not None:
            told["images_per_prompt"] = options.images_per_prompt
        if options.data is not None:
            told["data"] = pictures.open_pictures(options.data)
        told["extractors"] = features.make_extractors(tables["extractor"].items(), resize=options.resize, device=device)
        told["scorers"], told["judges"] = load_judges(tables["judge"], device=device, in_world=against == "world", timeout=remote.timeout)
        output = options.output or (folder if own else Path()) / "evaluation.json"
        report = measure_student(folder, teacher, config, output=output, share=share, progress=share[0] == 0 or not launched, **told)
        if launched and share[1] > 1:
            await_others()
            if share[0] == 0:
                report = measure_student(folder, teacher, config, output=output, **told)
    except ValueError as error:
        raise UserError(str(error)) from error
    if report is None:
        return 0
    if others:
        from rich.console import Console

        from fewstep.evaluate import protocol

        Console(width=None if sys.stdout.isatty() else 200).print(protocol.beside({str(output): report} | others))
    print(f"saved {output}")
    return 0


def read_report(path: Path) -> dict[str, Any]:
    """A report that `fewstep evaluate` saved. Raises UserError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol", "rows", "interval"} <= report.keys():
            raise ValueError("it has no protocol, rows and interval")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--beside: {path}: not a report of fewstep evaluate ({error})") from error
    return report


def await_others() -> None:
    """Wait until every process of a torchrun has come here."""
    import datetime

    import torch.distributed as processes

    processes.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    processes.barrier()
    processes.destroy_process_group()


# -- export ------------------------------------------------------------------------------------------------------------


def export_command(arguments: list[str]) -> int:
    parser = simple_parser("export", "Write a run's student in the form that other tools read; an unfinished run's newest checkpoint too.")
    parser.add_argument(
        "--to", required=True, choices=("diffusers", "lora", "kohya"),
        help="a full pipeline folder; the LoRA file and its scheduler; one LoRA file for ComfyUI and the web UIs (SD 1.5, 2.1, SDXL)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="an empty folder (default: FOLDER/export/FORM)")
    parser.add_argument("--push", metavar="ORG/NAME", default=None, help="upload it to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="a private repository")
    options = parser.parse_args(arguments)
    config = saved_config(options.folder)
    from fewstep import export, models

    models.quiet_libraries()
    told = {"to": options.to, "output": options.output, "repository": options.push, "private": options.private}
    try:
        export.export(options.folder, config, **told)
    except export.CannotExport as error:
        raise UserError(str(error)) from error
    return 0


# -- compare -----------------------------------------------------------------------------------------------------------


def compare_command(arguments: list[str]) -> int:
    import argparse

    from fewstep import compare as table
    from fewstep import models, world
    from fewstep.config import Config

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UserError(message)

    parser = Parser(prog="fewstep compare", description="Recipes x seeds on the embedded world, as one table.", allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, default=Path("compare"), help="folder for the cells, the table and the plots; a second call goes on"
    )
    parser.add_argument("--rows", nargs="+", default=["table"], metavar="NAME", help="rows, or sets of rows, to make (list: names them)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of every row (default: 5 for the main rows, 3 for the rest)")
    parser.add_argument(
        "--first-seed", type=int, default=100, help="settings were chosen on seeds below 100, so that none of those is reported"
    )
    parser.add_argument("--evaluations", type=int, default=180_000, help="network evaluations of each student's training")
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="a smoke version: two rows, one seed, a few updates")
    options = parser.parse_args(arguments)
    known, sets = table.EVERY_ROW, {"table": table.ROWS, "pareto": table.PARETO, "grid": table.GRID}
    if options.rows == ["list"]:
        print("\n".join(f"{name}: {len(rows)} rows" for name, rows in sets.items()), *known, sep="\n")
        return 0
    for name in options.rows:
        if name not in known and name not in sets:
            raise UserError(f"--rows: unknown row {name!r}{nearest(name, (*sets, *known))}")
    rows = tuple(row for name in options.rows for row in sets.get(name, (known.get(name),)))
    for name, value in (("seeds", options.seeds), ("evaluations", options.evaluations), ("jobs", options.jobs)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: must be at least 1, got {value}")
    device = resolve_hardware(Config(device=options.device)).device
    plan = table.Plan(options.output, options.evaluations, images_per_prompt=world.IMAGES_PER_PROMPT, prompts=128, threads=1, device=device)
    if options.quick:
        small = ("--groups", "2", "--group-size", "2")
        plan = dataclasses.replace(plan, evaluations=200, images_per_prompt=3, prompts=24, options=small)
        rows, options.seeds, options.jobs = (known["DMD"], known["GNDM"]), options.seeds or 1, 1
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the plots need matplotlib: pip install 'fewstep[plot]'") from error
    models.quiet_libraries()
    world.prompts("evaluate")
    try:
        summary = table.compare(plan, rows, seeds=options.seeds, first_seed=options.first_seed, jobs=options.jobs)
    except table.CellsFailed as error:
        raise UserError(str(error)) from error
    of_fronts = {row.name for row in table.PARETO}
    table.plot([entry for entry in summary if entry["row"] not in of_fronts], options.output / "compare.png")
    if any(entry["row"] in of_fronts for entry in summary):
        table.plot_pareto(summary, options.output / "pareto.png")
    print((options.output / "compare.md").read_text())
    return 0


# -- rewards -----------------------------------------------------------------------------------------------------------


def rewards_command(arguments: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from fewstep.rewards import rows

    if arguments:
        raise UserError(f"rewards: takes no arguments, got {arguments[0]!r}")
    header, *body = rows()
    table = Table(*header, show_lines=True)
    for row in body:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    return 0


def serve_reward_command(arguments: list[str]) -> int:
    from fewstep.rewards import serve

    try:
        return serve.command(arguments)
    except ValueError as error:
        raise UserError(f"serve-reward: {error}") from error


def convert_reward_command(arguments: list[str]) -> int:
    from fewstep import models
    from fewstep.rewards import convert

    models.quiet_libraries()
    try:
        return convert.command(arguments)
    except ValueError as error:
        raise UserError(f"convert-reward: {error}") from error


# -- sample ------------------------------------------------------------------------------------------------------------


def steps_of(student: Path) -> int | None:
    """Steps that a student's scheduler was made for; None when it does not say."""
    scheduler = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    if scheduler.get("stochastic_sampling") and scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler":
        return round(1 / (scheduler["shift_terminal"] or 1.0))  # the K-step grid ends at 1/K
    return scheduler.get("original_inference_steps")


def sample_command(arguments: list[str]) -> int:
    import hashlib

    parser = simple_parser("sample", "Draw pictures with a student, through stock diffusers.")
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--steps", type=int, default=None, help="steps (default: those the student was made for)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture's batch")
    parser.add_argument("-n", type=int, default=1, help="how many pictures")
    parser.add_argument("--size", default=None, help="HEIGHTxWIDTH in pixels (default: that of its training)")
    parser.add_argument("--output", type=Path, default=None, help="folder for the PNG files (default: FOLDER/pictures)")
    options = parser.parse_args(arguments)
    if not options.prompt.strip():
        raise UserError("--prompt: empty; say what to draw")
    if options.n < 1:
        raise UserError(f"-n: must be at least 1, got {options.n}")
    check_student(options.folder)
    made_for = steps_of(options.folder)
    steps = options.steps if options.steps is not None else made_for
    if steps != made_for:
        raise UserError(f"--steps: this student was made for {made_for} steps, not {steps}")
    from PIL import Image

    from fewstep import models
    from fewstep.config import Config

    models.quiet_libraries()
    from fewstep.evaluate.protocol import generate
    from fewstep.export import stored_dtype

    config = saved_config(options.folder) if (options.folder / "config.yaml").is_file() else Config()
    try:
        size = (dataclasses.replace(config, size=[options.size]) if options.size is not None else config).sizes()[0]
        device = evaluation_device()
        backbone = models.load(str(options.folder), device=device, dtype=stored_dtype(options.folder))
        backbone.latent_shape(size)
    except models.UnsupportedTeacher as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"--size: {error}") from error
    call = backbone.student_call | backbone.told_size(size)
    images, _ = generate(backbone.pipe.to(device), [options.prompt], options.n, steps=steps, seed=options.seed, call=call)
    output = options.output or options.folder / "pictures"
    output.mkdir(parents=True, exist_ok=True)
    with (output / "pictures.jsonl").open("a") as log:
        for index, image in enumerate(images):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            # the name holds a hash, never the prompt: any text may be a prompt, not any text a file name
            digest = hashlib.sha256(f"{options.seed}\0{options.prompt}".encode() + pixels.tobytes()).hexdigest()[:8]
            path = output / f"step{steps}-{index:03d}-{digest}.png"
            Image.fromarray(pixels).save(path)
            log.write(
                json.dumps({"file": path.name, "prompt": options.prompt, "seed": options.seed, "index": index, "steps": steps}) + "\n"
            )
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
