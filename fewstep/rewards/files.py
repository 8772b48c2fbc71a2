"""A reward's files: a folder, or the hub at a commit, and what is read of them. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fewstep import hub
from fewstep.disk import visible

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
WORDS = ("*.json", "*.txt", "*.model")  # configs, tokenizers, preprocessing


def convert_hint(name: str, path: str | Path) -> str:
    return f"{path} is a pickle, which is never loaded. Convert it once: fewstep convert-reward {name} {path} --output FOLDER"


def resolve(source: str) -> str:
    """The folder, or the hub id with its commit; without one it gets the newest. Raises ValueError."""
    path, named = Path(source).expanduser(), hub.parts(source)
    if path.is_dir():
        check_headers(path)
        return str(path)
    if named is None:
        raise ValueError(f"{source}: no such folder, and not a hub id (owner/name@commit)")
    repository, revision = named
    if revision is not None and hub.COMMIT.fullmatch(revision):
        return source
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().model_info(repository, revision=revision).sha
    except Exception as error:  # the hub's client raises many kinds; each means that the commit is unknown
        raise ValueError(f"{source}: no such folder, and the hub does not tell its commit ({type(error).__name__}: {error})") from error
    return f"{repository}@{commit}"


def fetch(source: str, *, weights: bool = True) -> Path:
    """The folder of a located source, downloaded if it is a hub id: safetensors, configs and tokenizer, never a pickle."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    repository, revision = hub.split(source)
    if revision is None:
        raise ValueError(f"{source}: no such folder, and not a hub id with its commit (owner/name@commit)")
    import huggingface_hub

    patterns = [*WORDS, "model*.safetensors"] if weights else list(WORDS)
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # as above
        raise ValueError(f"{source}: cannot be read from the hub ({type(error).__name__}: {error})") from error


def check_headers(folder: str | Path) -> None:
    """Raises ValueError naming a safetensors file of the folder that is cut off or none; no weights are read."""
    from safetensors import SafetensorError, safe_open

    for path in visible(folder, "*.safetensors"):
        try:
            safe_open(path, framework="numpy")  # its header tells how long the file has to be
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: damaged, or no safetensors file ({error}); get it again") from error


def check_safetensors(folder: str | Path) -> None:
    """Raises ValueError for a model's folder without whole safetensors, naming the pickle that it holds instead, if any."""
    check_headers(folder)
    if visible(folder, "*.safetensors"):
        return
    pickles = [path for path in visible(folder, "*") if path.suffix in PICKLES]
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


def digest_of(path: Path) -> Any:
    """SHA-256 over a file, or over a folder's weights, configs, tokenizer and preprocessing, with their names."""
    digest = hashlib.sha256()
    files = [file for file in visible(path, "*.safetensors", *WORDS) if file.is_file()] if path.is_dir() else [path]
    for file in files:
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
