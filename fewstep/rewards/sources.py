"""Where a reward comes from: a folder, the hub at a commit, a function in a file, a server. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.disk import replace_text
from fewstep.rewards import REWARDS, Named
from fewstep.rewards.address import TIMEOUT, is_remote
from fewstep.rewards.files import PICKLES, clip_of, convert_hint, digest_of, fetch, resolve

if TYPE_CHECKING:
    from fewstep.config import Config

OWN = "a function of the caller's own"  # in rewards.json
CODE = re.compile(r"(?s)(.+\.py):([^\W\d]\w*)")


def is_code(value: Any) -> bool:
    """Whether a value is path/to/file.py:function, which only the user's own flag may name."""
    return isinstance(value, str) and CODE.fullmatch(value) is not None


def settle_via(config: Config, own: Collection[str] = ()) -> Config:
    """The config with `via` given to every reward behind a server, which has scores and no gradient: the policy gradient, but
    where weights.mode advantage asks for scores alone. own: rewards that are the caller's functions, whatever their names. Raises
    ValueError for what cannot work."""
    via = dict(config.via)
    for name in config.reward:
        scorer, row = config.scorer.get(name), REWARDS.get(name)
        if name in own or not (is_remote(scorer) or (scorer is None and row is not None and not row.differentiable)):
            continue
        if config.weights.mode == "advantage":
            continue
        if via.setdefault(name, "policy") == "pathwise":
            raise ValueError(f"via.{name}: pathwise needs a gradient, and a server answers with scores alone; use policy")
        if config.steps == 1:
            raise ValueError(
                f"reward.{name}: a server answers with scores alone, and a one-step student has no stochastic step for a policy gradient: "
                "use 2 steps or more, or weights.mode advantage"
            )
    return dataclasses.replace(config, via=via)


def own_hint(flags: str, *, resume: bool = False) -> str:
    """How a reward or a judge that is in no table is named. flags: those that name it and where it is from."""
    again = "A run that goes on does not bring its code along: give it again. " if resume else ""
    folders = ", ".join(known for known, row in REWARDS.items() if row.built_by)
    return (
        f"{again}A folder or hub id takes the name of the reward that it reads as ({folders}; any CLIP or SigLIP as clip). "
        f"One of your own: {flags} path/to/file.py:function, or a server's address"
    )


def load_function(value: str) -> Callable[..., Any]:
    """The function that path/to/file.py:function names; the file is run, once for all functions of it. Raises ValueError naming what is
    missing."""
    path, name = CODE.fullmatch(value).groups()  # type: ignore[union-attr]
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    whole = str(Path(path).resolve()).encode() + digest_of(Path(path)).digest()  # a file that has changed is another one
    module_name = f"fewstep_reward_{hashlib.sha256(whole).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # any path that ends in .py has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses and pickles inside the file look it up
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[module_name]  # also after Ctrl-C: half of it would be taken for the file by a later call
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"{path}: running it raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: has no function {name!r}")
    return function


def locate(name: str, source: str | None, *, assets: Path | None = None, flag: str | None = None) -> str:
    """The folder, or the hub id with its commit, that a named reward is read from; a hub id without a commit gets its newest.

    `world` is the embedded world's own. assets: the same where no source is named; flag: how one is named. Raises ValueError.
    """
    row = REWARDS[name]
    if source == "world" and row.asset:
        from fewstep import world

        return str(world.ASSETS / row.asset)
    if source is None and assets is not None and row.asset:
        return str(assets / row.asset)
    if source is None and row.model is None:
        raise ValueError(missing(name, row, flag or f"--scorer.{name}"))
    source = source or row.model
    assert source is not None
    if Path(source).suffix.lower() in PICKLES:
        raise ValueError(convert_hint(name, source))
    return resolve(source)


def missing(name: str, row: Named, flag: str) -> str:
    """What to give a reward that has no model of its own."""
    if row.built_by is None:
        return f"runs in an environment of its own: start `fewstep serve-reward {name}` there and give {flag} http://127.0.0.1:PORT"
    if name in ("hps", "aesthetic"):
        return f"give the folder that `fewstep convert-reward {name}` made of the published weights, {flag} FOLDER"
    return f"give the folder or hub id of its model, {flag} FOLDER (only the embedded world brings its own)"


def build(name: str, source: str, *, device: Any = "cpu") -> Any:
    """A named reward from a located source. Raises ValueError or OSError."""
    row = REWARDS[name]
    if row.built_by is None:
        raise ValueError(missing(name, row, f"--scorer.{name}"))
    module, kind = row.built_by
    options = {"processor": fetch(row.processor, weights=False)} if row.processor and source == row.model else {}
    return getattr(importlib.import_module(module), kind).load(fetch(source), device=device, **options)


def open_judge(name: str, source: str | None, *, assets: Path | None = None, device: Any = "cpu", timeout: float = TIMEOUT) -> Any:
    """A reward to score with and never to train on, as a function of (images (B, 3, H, W), prompts) -> (B,): one in a file, a server's
    `ask`, or the `score` of a named reward from a folder or the hub.

    timeout: seconds for one try of a server. Raises ValueError or OSError.
    """
    if is_code(source):
        return load_function(str(source))
    if is_remote(source):
        from fewstep.rewards.remote import Remote

        return Remote(str(source), name, timeout=timeout).connect().ask
    return build(name, locate(name, source, assets=assets, flag=f"--judge.{name}"), device=device).score


def function_version(source: str) -> str:
    """Of path/to/file.py:function: its name too, for two functions of one file are not the same."""
    return f"file-{version(source)}:{source.rpartition(':')[2]}"


def weights_version(source: str) -> str:
    """Of a named reward's folder or hub id, as a server of it states it."""
    return f"weights-{version(source)}"


def is_of_content(version: Any) -> bool:
    """Whether a version that a server states tells what it serves whatever its name: `function_version` and `weights_version` do."""
    return isinstance(version, str) and version.startswith(("file-", "weights-"))


def version(source: str) -> str:
    """What tells two versions of a source apart: a hub id's commit, or a digest of all that is read of the folder or the file.

    Of a folder that names the CLIP it belongs to, as the aesthetic predictor's does, that CLIP's version too. Raises ValueError for a
    reward.json that cannot be read.
    """
    code = CODE.fullmatch(source)
    path = Path(code[1] if code else source).expanduser()
    if not path.exists():
        return source.rpartition("@")[2]
    digest = digest_of(path)
    clip = clip_of(path)
    if clip is not None and Path(clip).expanduser().is_dir():  # of one on the hub reward.json has the commit
        digest.update(digest_of(Path(clip).expanduser()).digest())
    return digest.hexdigest()[:12]


def records(
    rewards: Iterable[str], scorers: dict[str, str], functions: dict[str, Any], *, assets: Path | None
) -> dict[str, dict[str, str]]:
    """Name -> where each reward of a run comes from and in which version, as `rewards.json` keeps it."""
    told: dict[str, dict[str, str]] = {}
    for name in rewards:
        scorer, function = scorers.get(name), functions.get(name)
        if is_remote(scorer) and function is not None:
            server = getattr(function, "__self__", function)  # a judge is its bound `ask`
            told[name] = {"source": str(scorer), "served": server.served, "version": server.version}
        elif is_code(scorer):
            told[name] = {"source": str(scorer), "version": version(str(scorer))}
        elif function is not None:
            told[name] = {"source": OWN}
        elif name in REWARDS:
            source = locate(name, scorer, assets=assets)
            told[name] = {"source": source, "version": version(source)}
    return told


def told_so_far(path: Path) -> list[dict[str, Any]]:
    """What a run's `rewards.json` holds, from its first start on, if there is one. Raises ValueError for one that is damaged."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(kept, list):
        raise ValueError("no JSON list")
    if not all(is_record(entry) for entry in kept):
        raise ValueError("an entry of it names no rewards")
    return kept


def is_record(entry: Any) -> bool:
    """Whether it is what `write_records` appends."""
    rewards = entry.get("rewards") if isinstance(entry, dict) else None
    return isinstance(rewards, dict) and all(isinstance(each, dict) and "source" in each for each in rewards.values())


def write_records(path: Path, told: dict[str, dict[str, str]], update: int) -> list[str]:
    """Append what changed since the last start of the run; returns a line for each reward that is not what it was, and for each judge that
    is not there any more."""
    kept = told_so_far(path)
    before = kept[-1]["rewards"] if kept else {}
    lines = [
        f"reward {name!r} is version {now['version']} now; until update {update} it was {before[name]['version']}"
        for name, now in told.items()
        if "version" in now and "version" in before.get(name, {}) and now["version"] != before[name]["version"]
    ]
    for name, was in before.items():
        judge = name.removeprefix("judge.")
        if judge != name and name not in told and (is_code(was["source"]) or was["source"] == OWN):
            again = f"--judge.{judge} {was['source']}" if is_code(was["source"]) else f"judges={{{judge!r}: ...}} from Python"
            lines.append(f"judge {judge!r} is not asked any more: a run that goes on does not bring its code along. Give it again: {again}")
    if told != before:
        replace_text(path, json.dumps([*kept, {"from_update": update, "rewards": told}], indent=2) + "\n")
    return lines
