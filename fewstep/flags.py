"""Recipes and flags, as the config that they spell; what the commands about a student read of theirs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from os.path import expanduser  # Path.expanduser raises where there is no such user
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fewstep import hub
from fewstep.errors import UserError, as_word, nearest

if TYPE_CHECKING:
    from collections.abc import Collection

    from fewstep.config import Config


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
OPTIONAL_TEXTS = ("prompts", "init", "discriminator.latents")  # null where there is none
ONLY_BY_FLAG = "a file runs no code here: leave it out and give your own flag, --{} {}"


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
            out += [argument] if is_value else ["--help"] if argument == "-h" else ["--config", recipe_path(argument)]
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
    from fewstep.rewards.address import is_remote
    from fewstep.rewards.sources import is_code

    out: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--") and out and out[-1].startswith("--reward.") and "=" not in out[-1]:
            flag, equals, value = out.pop(), "=", argument
            argument = f"{flag}={value}"
        name = flag.removeprefix("--reward.")
        if name != flag and equals and ".py" in value and not (is_code(value) or is_remote(value)):
            raise UserError(f"{flag}: {value} names no function in a file; give path/to/file.py:function")
        if name != flag and equals and (is_code(value) or is_remote(value)):
            out += [f"--reward.{name}=1", f"--scorer.{name}={value}"]
        else:
            out.append(argument)
    return out


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


def recipe_path(argument: str) -> str:
    """A recipe's file: the one given, or the named one that ships with fewstep."""
    named = Path(__file__).parent / "recipes" / f"{argument}.yaml"
    if Path(argument).is_file() or not argument.replace("-", "_").isidentifier():
        return argument
    if not named.is_file():  # a folder may have a recipe's name, as that of its run
        what = "a folder, and no recipe" if Path(argument).exists() else "no such file or recipe"
        raise UserError(f"{argument}: {what}{nearest(argument, recipe_names())}")
    return str(named)


def check_recipe(path: Path, names: dict[str, type]) -> dict[str, Any]:
    """What a YAML recipe holds. Raises UserError, naming file and key, for a key that is unknown, comes twice or has no value, and
    for code: a file runs none."""
    import yaml

    from fewstep.rewards.sources import is_code

    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
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
            elif inside := [each for each in names if each.startswith(f"{name}.")]:
                raise UserError(f"{path}: {name} is a group of keys, as {inside[0]}; got {value!r}")
            elif value is None and not (name.startswith("judge.") or type(None) in get_args(names.get(name))):
                raise UserError(f"{path}: {name} has no value; give it one, or leave the key out")

    walk(recipe, "")
    check_once(path, yaml.compose(text, Loader=yaml.SafeLoader))
    return recipe


def check_once(path: Path, table: Any, prefix: str = "") -> None:
    """Raises UserError for a key that comes twice in a table of a recipe, as a YAML node: a parser keeps the last and says nothing."""
    lines: dict[str, int] = {}
    for key, _ in table.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}: {name} comes twice, in line {lines[name]} and in line {line}, of which one would be lost; join them")
        lines[name] = line
    for key, value in table.value:
        if value.id == "mapping":
            check_once(path, value, f"{prefix}{key.value}.")


WRONG_TYPE = re.compile(r"Parser key \"([\w.]+)\": .*?Expected an? (.+?)\. Got value: (.*)")
PAIR = "two numbers in brackets, as [0.9, 0.99]"
TEXT = "a text, which needs quotes in a file where YAML reads something else"
KINDS = {
    "<class 'str'>": TEXT,
    "<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false",
    "<class 'dict'>": "a table of NAME: value", "<class 'tuple'>": PAIR, "tuple with 2 elements": PAIR,
}  # fmt: skip


NUMBER_OR_PAIR = re.compile(
    r"Parser key \"([\w.]+)\": .*Union subtypes Subtypes: \[<class 'float'>, tuple\[float, float\]\].*Given value: (.*)"
)


TEXT_OR_NONE = re.compile(r"Parser key \"([\w.]+)\": .*Union subtypes Subtypes: \[<class 'str'>, <class 'NoneType'>\].*Given value: (.*)")


def in_plain_words(message: str) -> str:
    """What the parser says of a value of the wrong type, without the names that types have in Python."""
    if found := NUMBER_OR_PAIR.search(message):
        return f"{found[1]}: must be a number, or two in brackets, as [1.5, 8]; got {found[2]}"
    if found := TEXT_OR_NONE.search(message):
        return f"{found[1]}: must be {TEXT}, or null for none; got {found[2]}"
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

    A recipe overrides those before it, a flag every recipe, wherever it stands; a run that goes on starts from its own saved config. Raises
    UserError naming the flag, or the file and key.
    """
    from fewstep.config import Config

    names = field_names(Config)
    arguments = normalise(arguments, names)
    found = parse(arguments, names)
    output = found[0].output
    saved = Path(output) / "config.yaml"
    if found[0].resume and saved.is_file():  # the folder may have been moved since: where it is now is what was named
        try:
            check_recipe(saved, names)
        except UserError as error:
            raise UserError(f"{error}; {without_config(output)}") from error
        found = parse(["--config", str(saved), *arguments, "--output", output], names)
    return found


def without_config(output: str | Path) -> str:
    """What to do about a run whose config is lost or damaged."""
    return f"put its config.yaml back as it was, or begin a new run with its student, --init {as_word(output)} --output NEW"


def parse(arguments: list[str], names: dict[str, type]) -> tuple[Config, list[str], list[str]]:
    """`read_config` of normalised arguments, as they are."""
    from fewstep.config import Config

    recipes, flags = recipes_and_flags(arguments)
    held = [check_recipe(Path(recipe), names) for recipe in recipes]
    parser = config_parser()
    try:
        parsed = parser.parse_args([part for recipe in recipes for part in ("--config", recipe)] + flags)
        parsed = parser.instantiate(texts_as_given(parsed, held, flags))
    except UserError:
        check_types(recipes)
        raise
    return at_home(Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)})), recipes, flags


NONE = ("null", "Null", "NULL", "~")


def texts_as_given(parsed: Any, recipes: list[dict[str, Any]], flags: list[str]) -> Any:
    """What the parser has read, with the texts that may be none as recipes and flags have them: it reads one that YAML has no word in, as
    `#1.txt`, for none, even in quotes. A flag's `null` is none."""
    texts = {name: value for recipe in recipes for name, value in as_values(recipe).items()}
    given = {flag.removeprefix("--"): text for flag, text in flag_values(flags).items() if flag.startswith("--")}  # not a value
    texts |= {name: None if text.strip() in NONE else text for name, text in given.items()}
    for name, text in texts.items():
        if name in OPTIONAL_TEXTS and parsed[name] is None:
            parsed[name] = text
        elif name.startswith("judge.") and parsed["judge"].get(key := name.removeprefix("judge."), "") is None:
            parsed["judge"][key] = text
    return parsed


def at_home(config: Config) -> Config:
    """The config with the `~` that begins a path as the user's own folder: a shell knows it at the beginning of a word alone."""

    def whole(value: Any) -> Any:
        return expanduser(value) if isinstance(value, str) else value

    paths = {name: whole(getattr(config, name)) for name in ("teacher", "prompts", "output", "init")}
    paths |= {table: {name: whole(value) for name, value in getattr(config, table).items()} for table in ("scorer", "judge")}
    latents = dataclasses.replace(config.discriminator, latents=whole(config.discriminator.latents))
    return dataclasses.replace(config, **paths, discriminator=latents)


def check_types(recipes: list[str]) -> None:
    """Raise UserError naming the first recipe that holds a value of a wrong type: read together, none is told from the flags."""
    for recipe in recipes:
        try:
            config_parser().parse_args(["--config", recipe])
        except UserError as error:
            raise UserError(f"{recipe}: {error}") from error


def parse_config(arguments: list[str], own: Collection[str] = ()) -> Config:
    """The config of a run from recipes and flags. own: rewards that are the caller's functions. Raises UserError naming the flag, or the
    file and key."""
    from fewstep.rewards.sources import settle_via

    try:
        config = settle_via(without_code(arguments), own)
    except ValueError as error:
        raise UserError(str(error)) from error
    problems = config.problems()
    if problems:
        raise UserError("; ".join(problems))
    return config


def without_code(arguments: list[str]) -> Config:
    """`read_config`'s, which names no code but by the user's own flags. Raises UserError."""
    from fewstep.rewards.sources import is_code

    config, recipes, flags = read_config(arguments)
    given = flag_values(flags)
    for table in ("scorer", "judge"):
        for key, value in getattr(config, table).items():
            name = f"{table}.{key}"
            if is_code(value) and expanduser(given.get(f"--{name}", "")) != value:  # however a recipe may have spelt it
                raise UserError(f"{', '.join(recipes) or f'--{table}'}: {name} names code, {value}; {ONLY_BY_FLAG.format(name, value)}")
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
    if name not in recipe_names():
        print(f"there is no recipe {name} yet: what you did not set is as the embedded world has it")
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


def flag_values(arguments: list[str]) -> dict[str, str]:
    """What each flag is given, after it or behind its =, the last one winning."""
    found: dict[str, str] = {}
    for argument, following in itertools.pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        found[flag] = value if equals else following
    return found


def as_arguments(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested keyword arguments as the flags that say the same."""
    out: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            out += as_arguments(value, f"{prefix}{key}.")
        elif value is not None:
            out.append(f"--{prefix}{key}={json.dumps(value) if isinstance(value, (bool, list, tuple)) else value}")
    return out


def as_yaml(plain: dict[str, Any]) -> str:
    """A config as a file that reads as what it is: the parser takes `1e-5` for a number, for which PyYAML writes it without quotes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: Any, text: str) -> Any:
        try:
            float(text)
        except ValueError:
            return dumper.represent_str(text)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")

    Dumper.add_representer(str, represent)
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False)


def as_plain(config: Config) -> dict[str, Any]:
    """The config as YAML and JSON hold it: without the code that it named, which no file may."""
    from fewstep.rewards.sources import is_code

    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    for table in ("scorer", "judge"):
        plain[table] = {name: value for name, value in plain[table].items() if not is_code(value)}
    return plain


def command_parser(name: str, description: str) -> Any:
    """An argparse parser of one command whose complaints are UserErrors."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UserError(message)

    return Parser(prog=f"fewstep {name}", description=description, allow_abbrev=False)


def student_parser(name: str, description: str, *, on_hub: bool = False) -> Any:
    """The parser of a command about one student. on_hub: it may be there."""
    parser = command_parser(name, description)
    parser.add_argument("folder", type=Path, help="a student's folder" + (", or its hub id (owner/name[@revision])" if on_hub else ""))
    return parser


def is_student_folder(folder: Path) -> bool:
    """Whether it is a folder, which holds a finished student, or else a hub id. Raises UserError for what is neither."""
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            from fewstep import models

            hint = f"; {models.ONE_LORA}" if models.lora_in(folder) else ""
            raise UserError(f"{folder}: holds no finished student (no model_index.json){hint}")
        return True
    if hub.parts(folder.as_posix()) is None:
        raise UserError(f"{folder}: no such folder, and not a hub id (owner/name)")
    return False


def saved_config(folder: Path) -> Config:
    """The config of a run, as it was trained: what would be refused of a new one by now is none of a student's. Raises UserError when the
    folder holds none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run of fewstep (no config.yaml)")
    return without_code([str(folder / "config.yaml")])


EXPORTED = "fewstep.json"  # beside an exported student: of its run's config, what drawing and measuring it need


def student_config(folder: Path) -> Config | None:
    """What a student's folder says of its training: all of its run's config, or of an exported student the keys of EXPORTED; None where it
    says nothing. Raises UserError."""
    if (folder / "config.yaml").is_file():
        return saved_config(folder)
    return without_code(["--config", str(folder / EXPORTED)]) if (folder / EXPORTED).is_file() else None


def table_flags(arguments: list[str], tables: tuple[str, ...]) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """(table -> key -> value of every --TABLE.KEY [VALUE], the other arguments). Raises UserError for a key that comes twice."""
    found: dict[str, dict[str, str | None]] = {table: {} for table in tables}
    rest, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        table, _, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and table in found and key):
            rest.append(argument)
            continue
        if key in found[table]:
            raise UserError(f"{flag}: given twice")
        found[table][key] = value if equals else left.pop(0) if left and not left[0].startswith("--") else None
    return found, rest
