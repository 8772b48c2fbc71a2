"""Where a reward comes from: a folder, the hub at a commit, a function in a file, a server. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import ipaddress
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fewstep.rewards import REWARDS, Named

if TYPE_CHECKING:
    from fewstep.config import Config

CODE = re.compile(r"(?s)(.+\.py):([^\W\d]\w*)")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
WORDS = ("*.json", "*.txt", "*.model")  # configs, tokenizers, preprocessing
TIMEOUT = 120.0  # seconds for one try of one request to a server, from connecting to the last byte


def is_code(value: Any) -> bool:
    """Whether a value is path/to/file.py:function, which only the user's own flag may name."""
    return isinstance(value, str) and CODE.fullmatch(value) is not None


def is_remote(value: Any) -> bool:
    """Whether a value is the address of a server."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def check_url(url: str) -> str:
    """The address without a slash at its end. Raises ValueError for one that pictures must not be sent to.

    Plain http is for this machine alone: elsewhere anyone on the way could read the pictures and change the scores.
    """
    parts = urlsplit(url)
    try:
        host, _ = parts.hostname, parts.port  # the port is parsed when it is asked for
    except ValueError as error:
        raise ValueError(f"{url}: not an address ({error})") from error
    if not host or parts.query or parts.fragment or parts.username is not None or re.search(r"[\s\x00-\x1f]", url):
        raise ValueError(f"{url}: an address is https://HOST:PORT, with a path perhaps, and no user name, query or blank")
    if parts.scheme.lower() == "http" and not is_loopback(host):
        raise ValueError(f"{url}: plain http is for this machine alone; use https, or a tunnel to http://127.0.0.1:PORT")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number alone, without asking any name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def settle_via(config: Config) -> Config:
    """The config with `via` given to every reward behind a server, which has scores and no gradient: the policy gradient, but
    where weights.mode advantage asks for scores alone. Raises ValueError for what cannot work."""
    via = dict(config.via)
    for name in config.reward:
        scorer, row = config.scorer.get(name), REWARDS.get(name)
        if not (is_remote(scorer) or (scorer is None and row is not None and not row.differentiable)):
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


def own_hint(name: str, *, resume: bool) -> str:
    """How a reward of the user's own is named."""
    again = "A run that goes on does not bring its code along: give it again. " if resume else ""
    return f"{again}One of your own: --reward.{name} WEIGHT --scorer.{name} path/to/file.py:function, or a server's address"


def load_function(value: str) -> Callable[..., Any]:
    """The function that path/to/file.py:function names; the file is run. Raises ValueError naming what is missing."""
    path, name = CODE.fullmatch(value).groups()  # type: ignore[union-attr]
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    module_name = f"fewstep_reward_{hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # any path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles inside the file look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: running it raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: has no function {name!r}")
    return function


def convert_hint(name: str, path: str | Path) -> str:
    return f"{path} is a pickle, which is never loaded. Convert it once: fewstep convert-reward {name} {path} --output FOLDER"


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


def resolve(source: str) -> str:
    """The folder, or the hub id with its commit; without one it gets the newest. Raises ValueError."""
    path, hub = Path(source).expanduser(), HUB.fullmatch(source)
    if path.is_dir():
        check_headers(path)
        return str(path)
    if path.exists() or hub is None or source.startswith((".", "~")):
        raise ValueError(f"{source}: no such folder, and not a hub id (owner/name@commit)")
    if hub[2] is not None and COMMIT.fullmatch(hub[2]):
        return source
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(hub[1], revision=hub[2]).sha
    except Exception as error:  # the hub's client raises many kinds; each means that the commit is unknown
        raise ValueError(f"{source}: no such folder, and the hub does not tell its commit ({type(error).__name__}: {error})") from error
    return f"{hub[1]}@{commit}"


def missing(name: str, row: Named, flag: str) -> str:
    """What to give a reward that has no model of its own."""
    if row.built_by is None:
        return f"runs in an environment of its own: start `fewstep serve-reward {name}` there and give {flag} http://127.0.0.1:PORT"
    if name in ("hps", "aesthetic"):
        return f"give the folder that `fewstep convert-reward {name}` made of the published weights, {flag} FOLDER"
    return f"give the folder or hub id of its model, {flag} FOLDER (only the embedded world brings its own)"


def fetch(source: str, *, weights: bool = True) -> Path:
    """The folder of a located source, downloaded if it is a hub id: safetensors, configs and tokenizer, never a pickle."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    hub = HUB.fullmatch(source)
    if hub is None or hub[2] is None:
        raise ValueError(f"{source}: no such folder, and not a hub id with its commit (owner/name@commit)")
    import huggingface_hub

    patterns = [*WORDS, "model*.safetensors"] if weights else list(WORDS)
    try:
        return Path(huggingface_hub.snapshot_download(hub[1], revision=hub[2], allow_patterns=patterns))
    except Exception as error:  # as above
        raise ValueError(f"{source}: cannot be read from the hub ({type(error).__name__}: {error})") from error


def check_headers(folder: str | Path) -> None:
    """Raises ValueError naming a safetensors file of the folder that is cut off or none; no weights are read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            safe_open(path, framework="numpy")  # its header tells how long the file has to be
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: damaged, or no safetensors file ({error}); get it again") from error


def check_safetensors(folder: str | Path) -> None:
    """Raises ValueError for a model's folder without whole safetensors, naming the pickle that it holds instead, if any."""
    check_headers(folder)
    if any(Path(folder).glob("*.safetensors")):
        return
    pickles = sorted(path for path in Path(folder).glob("*") if path.suffix in PICKLES)
    if pickles:
        raise ValueError(convert_hint("NAME", pickles[0]))
    raise ValueError(f"{folder}: holds no weights (*.safetensors)")


def read_model(kind: Any, folder: str | Path, *, more: bool = False) -> Any:
    """The transformers model of class `kind` in a folder, all its weights the folder's own: transformers draws the others at random.

    more: the folder may hold weights that the class does not read. Raises ValueError naming the folder and the weights that are amiss.
    """
    check_safetensors(folder)
    # ignored so that they are told like the others
    told = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        model, report = kind.from_pretrained(folder, **told)
    except (OSError, ValueError) as error:  # a shard that the index names is not there; a kind of model that is not known
        raise ValueError(f"{folder}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    unknown = [] if more else [name for name in report["unexpected_keys"] if not name.endswith("position_ids")]  # old versions kept them
    shapes = [f"{name} {tuple(held)}, not {tuple(wanted)}" for name, held, wanted in report["mismatched_keys"]]
    amiss = {"missing": sorted(report["missing_keys"]), "unknown": sorted(unknown), "of another shape": sorted(shapes)}
    said = [f"{len(names)} {what}, as {names[0]}" for what, names in amiss.items() if names]
    if said:
        raise ValueError(f"{folder}: its weights are not those of a whole {type(model).__name__}: {'; '.join(said)}; get them again")
    return model


def build(name: str, source: str, *, device: Any = "cpu") -> Any:
    """A named reward from a located source. Raises ValueError or OSError."""
    row = REWARDS[name]
    if row.built_by is None:
        raise ValueError(missing(name, row, f"--scorer.{name}"))
    module, kind = row.built_by
    options = {"processor": fetch(row.processor, weights=False)} if row.processor and source == row.model else {}
    return getattr(importlib.import_module(module), kind).load(fetch(source), device=device, **options)


def open_judge(name: str, source: str | None, *, assets: Path | None = None, device: Any = "cpu", timeout: float = TIMEOUT) -> Any:
    """A reward to score with and never to train on: a named one from a folder or the hub, a function in a file, a server.

    timeout: seconds for one try of a server.

    A function of (images (B, 3, H, W), prompts) -> (B,), or an object whose `score` is one. Raises ValueError or OSError.
    """
    if is_code(source):
        return load_function(str(source))
    if is_remote(source):
        from fewstep.rewards.remote import Remote

        return Remote(str(source), name, timeout=timeout).connect().ask
    return build(name, locate(name, source, assets=assets, flag=f"--judge.{name}"), device=device)


def function_version(source: str) -> str:
    """Of path/to/file.py:function: its name too, for two functions of one file are not the same."""
    return f"file-{version(source)}:{source.rpartition(':')[2]}"


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


def digest_of(path: Path) -> Any:
    """SHA-256 over a file, or over a folder's weights, configs, tokenizer and preprocessing, with their names."""
    patterns = ("*.safetensors", *WORDS)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}) if path.is_dir() else [path]:
        with file.open("rb") as held:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(held, "sha256").digest())
    return digest


def clip_of(folder: Path) -> str | None:
    """The folder or hub id of the CLIP that a reward's folder names in its reward.json. Raises ValueError for one that cannot be read."""
    path = folder / "reward.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["clip"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as the name of a CLIP ({type(error).__name__}: {error})") from error


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
            told[name] = {"source": "a function of the caller's own"}
        elif name in REWARDS:
            source = locate(name, scorer, assets=assets)
            told[name] = {"source": source, "version": version(source)}
    return told


def write_records(path: Path, told: dict[str, dict[str, str]], update: int) -> list[str]:
    """Append what changed since the last start of the run; returns a line for each reward that is not what it was."""
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    before = kept[-1]["rewards"] if kept else {}
    lines = [
        f"reward {name!r} is version {now['version']} now; until update {update} it was {before[name]['version']}"
        for name, now in told.items()
        if "version" in now and "version" in before.get(name, {}) and now["version"] != before[name]["version"]
    ]
    if told != before:
        path.write_text(json.dumps([*kept, {"from_update": update, "rewards": told}], indent=2) + "\n")
    return lines
