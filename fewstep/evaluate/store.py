"""What is kept of a sample, in parts on disk: hashes that name it, files written whole or not at all, and matrices read row by row."""

from __future__ import annotations

import bisect
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.disk import replace, replace_text

SHARD = 256  # pictures of one part


# Hashes


def sha256(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Take a tensor's name, shape, type and bytes into a hash."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of a module's weights and buffers; `configs` has what they do not tell."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def nameless(module: nn.Module) -> str:
    """SHA-256 over the shapes, types and bytes of a module's weights and buffers, whatever they are called: libraries rename them."""

    def of(tensor: Tensor) -> str:
        digest = hashlib.sha256()
        add_tensor(digest, "", tensor)
        return digest.hexdigest()

    return sha256(sorted(map(of, module.state_dict().values())))


# Files


def read(path: Path) -> dict[str, Tensor] | None:
    """A kept sample, or None when there is none; a damaged one is passed over with a warning."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path}: damaged, drawn again ({error})", stacklevel=2)
        return None


def write(path: Path, tensors: dict[str, Tensor], **said: str) -> None:
    """Tensors as a safetensors file, whole or not at all. said: of them, in the file's header."""
    replace(path, lambda temporary: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=said))


def write_note(path: Path, note: dict[str, Any]) -> None:
    """What lies beside it was measured on, in JSON."""
    replace_text(path, json.dumps(note, indent=1))


def keep(path: Path, observed: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Keep a sample's features, scores and times at `path`, and beside it, in JSON, what they were measured on."""
    write_note(path.with_suffix(".json"), note)
    write(path, observed)


# Parts


class Rows:
    """A matrix (N, d), or a vector (N,), whose rows lie in several files: slices, and rows by their numbers, are read when asked for.

    factor: what every number is multiplied by.
    """

    def __init__(self, parts: Sequence[Path], name: str, *, factor: float = 1.0):
        self.parts, self.name, self.factor, self.starts = list(parts), name, factor, [0]
        inner: tuple[int, ...] = ()
        for part in self.parts:
            with safe_open(part, "pt") as file:
                rows, *inner = file.get_slice(name).get_shape()
            self.starts.append(self.starts[-1] + rows)
        self.shape = torch.Size([self.starts[-1], *inner])

    def __len__(self) -> int:
        return self.starts[-1]

    def times(self, factor: float) -> Rows:
        return Rows(self.parts, self.name, factor=self.factor * factor)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """By a slice without a step, or by numbers (n,) int64 in any order."""
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            found = [self.part(i, slice(max(first - start, 0), end - start)) for i, start in self.touched(first, end)]
            out = torch.cat(found) if found else self.part(0, slice(0, 0))
        else:
            out = torch.empty(len(rows), *self.shape[1:])
            owner = torch.bucketize(rows, torch.tensor(self.starts[1:]), right=True)
            for i in owner.unique().tolist():
                mine = owner == i
                out[mine] = self.part(i, slice(None))[rows[mine] - self.starts[i]].to(out.dtype)
        return out if self.factor == 1 else out * self.factor

    def touched(self, first: int, end: int) -> list[tuple[int, int]]:
        """(number, first row) of every part with rows in [first, end)."""
        if first >= end:
            return []
        return [(i, self.starts[i]) for i in range(bisect.bisect_right(self.starts, first) - 1, bisect.bisect_left(self.starts, end))]

    def part(self, i: int, rows: slice) -> Tensor:
        with safe_open(self.parts[i], "pt") as file:
            return file.get_slice(self.name)[rows]


class Shards:
    """The parts of what is seen of `n` pictures: part i holds pictures i * size to (i + 1) * size, in a file named by the key.

    The key is a hash of all that decides the numbers, so parts that were made otherwise are never taken for this sample's.
    """

    def __init__(self, folder: Path, note: dict[str, Any], n: int, *, size: int = SHARD):
        self.folder, self.note, self.n, self.size = folder, note, n, size
        self.key = sha256(note)
        self.count = -(-n // size)

    def path(self, i: int) -> Path:
        return self.folder / f"{self.key}-{i:05d}.safetensors"

    def pictures(self, i: int) -> range:
        return range(i * self.size, min((i + 1) * self.size, self.n))

    def missing(self) -> list[int]:
        """Parts that are not there, or are damaged, which is said."""
        return [i for i in range(self.count) if not self.whole(i)]

    def whole(self, i: int) -> bool:
        """Whether a part can be read; the file's own length and table of contents are checked."""
        if not self.path(i).is_file():
            return False
        try:
            with safe_open(self.path(i), "pt"):
                return True
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{self.path(i)}: damaged, drawn again ({error})", stacklevel=3)
            return False

    def save(self, i: int, tensors: dict[str, Tensor], **said: str) -> None:
        if not self.path(i).with_name(f"{self.key}.json").is_file():
            write_note(self.folder / f"{self.key}.json", self.note)
        write(self.path(i), tensors, **said)

    def read(self, i: int, prefix: str) -> dict[str, Tensor]:
        """What a part holds under names that begin with `prefix`."""
        with safe_open(self.path(i), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def open(self) -> dict[str, Rows]:
        """Everything that the parts hold, by name. Raises FileNotFoundError when a part is missing."""
        parts = [self.path(i) for i in range(self.count)]
        with safe_open(parts[0], "pt") as file:
            names = list(file.keys())
        return {name: Rows(parts, name) for name in names}

    def said(self, name: str) -> list[str]:
        """What the parts' headers say under a name, as the machines that they were drawn on ("device"), each once."""
        found = set()
        for i in range(self.count):
            with safe_open(self.path(i), "pt") as file:
                found.add((file.metadata() or {}).get(name, "unknown"))
        return sorted(found)


def my_share(of: list[int], share: tuple[int, int]) -> list[int]:
    """The parts that process i of n makes: every n-th."""
    i, n = share
    return [number for number in of if number % n == i]
