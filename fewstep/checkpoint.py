"""Everything a run needs to go on, written so that a kill at any moment loses nothing saved.

A checkpoint is a folder: `state.safetensors` (every tensor), `state.json` (everything else) and `manifest.json`
(size and SHA-256 of both). It is written beside its final name, synced, and renamed; older ones are pruned only then.
No pickle is read or written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.disk import errno_of, rename, replace, sync

FILES = ("state.safetensors", "state.json")
NAME = re.compile(r"step-\d{8,}")
LEFT = re.compile(r"\.(stale|writing)-\d{8,}")  # by a killed save
TENSOR = "__tensor__"
KEYS = "__keys__"


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that cannot be trusted; the message names the file and what is wrong with it."""


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and scalars into (tensors by path, JSON value with a reference in each tensor's place)."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach().cpu().contiguous().clone()
            return {TENSOR: path}
        if isinstance(node, dict):
            if all(isinstance(key, str) for key in node):
                return {key: walk(value, f"{path}/{key}") for key, value in node.items()}
            # JSON turns integer keys (an optimizer's parameter numbers) into text: keep them as [key, value] pairs
            return {KEYS: [[key, walk(value, f"{path}/{key}")] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}/{i}") for i, value in enumerate(node)]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"cannot save {type(node).__name__} at {path}: use tensors, numbers, text, lists and dicts")

    return tensors, walk(tree, "")


def unpack(tensors: dict[str, Tensor], value: Any) -> Any:
    """Inverse of `pack` (tuples come back as lists)."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        if KEYS in value:
            return {key: unpack(tensors, item) for key, item in value[KEYS]}
        return {key: unpack(tensors, item) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(tensors, item) for item in value]
    return value


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(root: str | Path, step: int, tree: Any, *, keep: int = 2) -> Path:
    """Write `root/step-XXXXXXXX` atomically and keep it and those before it, `keep` in all. Returns the folder.

    One process writes a run's folder: what a killed save left in it is cleared first. Raises OSError naming the folder and the bytes when
    they cannot be written; what was saved before is whole, what was half written removed.
    """
    root = Path(root)
    final = root / f"step-{step:08d}"
    temporary, stale = root / f".writing-{step:08d}", root / f".stale-{step:08d}"
    tensors, value = pack(tree)
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear(root)
        temporary.mkdir()
        replace(temporary / FILES[0], lambda path: save_file(tensors, path))
        (temporary / FILES[1]).write_text(json.dumps(value), encoding="utf-8")
        manifest = {name: {"bytes": (temporary / name).stat().st_size, "sha256": digest(temporary / name)} for name in FILES}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": manifest}, indent=1), encoding="utf-8")
        for name in (*FILES, "manifest.json"):
            sync(temporary / name)
        sync(temporary)
        if final.exists():  # the same step saved again: between the two renames the old one is found under its stale name
            rename(final, stale)
            rename(temporary, final)
            discard(stale)
        else:
            rename(temporary, final)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if stale.exists() and not final.exists():
            rename(stale, final)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        number = errno_of(error) or errno.EIO
        raise OSError(number, f"could not write checkpoint of {size} bytes: {os.strerror(number)}", str(final)) from error
    for old in [folder for folder in checkpoints(root) if int(step_of(folder)) <= step][:-keep]:
        discard(old)
    return final


def discard(folder: Path) -> None:
    """Remove what is not needed any more; on Windows what another process reads just then stays until the next save, which this says."""
    try:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    except PermissionError as error:
        warnings.warn(f"{folder}: not needed any more, and cannot be removed yet ({error.strerror})", stacklevel=3)


def clear(root: Path) -> None:
    """Remove what killed saves left under `root`, and put back, with a warning, the checkpoint that one had moved aside."""
    for stale in left_by_kills(root, ".stale-*"):
        final = root / f"step-{step_of(stale)}"
        if is_whole(stale) and not is_whole(final):
            shutil.rmtree(final, ignore_errors=True)
            rename(stale, final)
            warnings.warn(f"{final}: the save that was to take its place was killed; the earlier one is back", stacklevel=2)
        else:
            discard(stale)
    for left in left_by_kills(root, ".writing-*"):
        discard(left)


def left_by_kills(root: Path, pattern: str) -> list[Path]:
    return [path for path in root.glob(pattern) if LEFT.fullmatch(path.name)]


def step_of(folder: Path) -> str:
    """The digits of a checkpoint's name, or of what a save left behind."""
    return folder.name.split("-")[1]


def is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except DamagedCheckpoint:
        return False
    return True


def checkpoints(root: str | Path) -> list[Path]:
    """Finished checkpoints under `root`, oldest first; none is a folder with more or less in its name, as a copy that someone made."""
    found = (path for path in Path(root).glob("step-*") if path.is_dir() and NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(step_of(path)))


def recorded(folder: Path) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256) of each of FILES, as the checkpoint's manifest says. Raises DamagedCheckpoint."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {name: (int(manifest["files"][name]["bytes"]), str(manifest["files"][name]["sha256"])) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / 'manifest.json'}: unreadable manifest ({error})") from error


def check(folder: Path) -> None:
    """Raises DamagedCheckpoint when a file of the checkpoint is missing, truncated or altered."""
    for name, (size, sha) in recorded(folder).items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
        if digest(path) != sha:
            raise DamagedCheckpoint(f"{path}: contents differ from the manifest's SHA-256")


def load(folder: str | Path, *, only: Collection[str] | None = None) -> Any:
    """Read one checkpoint, or some keys of it: the rest of it may be many times the student. Its tensors are the file itself, mapped: none
    of them may be kept, or the disk never gets the file's room back, and Windows does not even remove it. Raises DamagedCheckpoint when a
    file is missing, truncated or altered.
    """
    folder = Path(folder)
    check(folder)
    value = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    if only is not None:
        value = {key: value[key] for key in only}
    with safe_open(folder / FILES[0], "pt") as file:
        tensors = {path: file.get_tensor(path) for path in file.keys() if only is None or path.split("/")[1] in only}  # noqa: SIM118
    return unpack(tensors, value)


def newest(root: str | Path, *, only: Collection[str] | None = None) -> tuple[Path, Any] | None:
    """The newest *valid* checkpoint and its contents (or those keys of it), or None when there is none at all.

    Damaged ones are skipped with a warning that names them, as are folders whose name is only like a checkpoint's; when nothing else is
    there that is an error, never a silent start from step 0. One that a killed save of the same step had moved aside is read where it
    lies (another process may be the folder's writer), and the next save, or `clear`, puts it back.
    """
    stale = left_by_kills(Path(root), ".stale-*")
    found = sorted([*checkpoints(root), *stale], key=lambda path: (int(step_of(path)), path.name.startswith("step-")))
    problems = []
    for folder in sorted(path for path in Path(root).glob("step-*") if path.is_dir() and path not in found):
        problems.append(f"{folder}: a checkpoint is named step- and eight digits; keep a copy in another folder")
        warnings.warn(f"passed over: {problems[-1]}", stacklevel=2)
    for folder in reversed(found):
        try:
            return folder, load(folder, only=only)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
    if problems:
        raise DamagedCheckpoint("no checkpoint can be read:\n  " + "\n  ".join(problems))
    return None


def averaged(state: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged student in a trainer's state, by parameter name."""
    return dict(zip(state["student"], state["ema"]["shadow_params"], strict=True))


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's default generators of the CPU and of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Give torch's generators a saved state. A GPU's that has none in it, as in a CPU's checkpoint, stays as it is, with a warning; and
    there is one where a GPU's run goes on on the CPU."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cuda":
        if state.keys() != {"cpu"}:
            warnings.warn(f"the checkpoint is of a run on a GPU, which goes on on the {device.type.upper()}", stacklevel=2)
        return
    own = state.get("device")
    if own is None:
        warnings.warn(f"the checkpoint has no random state of {device}, as one saved on a CPU: that begins with the seed", stacklevel=2)
    else:
        torch.cuda.set_rng_state(own, device)
