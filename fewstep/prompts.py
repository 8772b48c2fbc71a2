"""Prompt files, and the batches of groups made from them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

LONGEST = 10_000  # characters; text encoders read up to 512 tokens, some 2500, so a line as long as this is a mistake


class BadPrompts(ValueError):
    """A prompt file that cannot be used; the message names the file and the line."""


def read(path: str | Path, *, repeats: bool = False) -> list[str]:
    """Prompts of a UTF-8 text file, one a line; blank lines are dropped, and repeats too unless they are wanted. Raises BadPrompts."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadPrompts(f"{path}: cannot be read ({error.strerror})") from error
    prompts: list[str] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadPrompts(f"{path}, line {number}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error
        if "\0" in line:
            raise BadPrompts(f"{path}, line {number}: holds a NUL character")
        if len(line) > LONGEST:
            raise BadPrompts(f"{path}, line {number}: {len(line)} characters; a prompt has {LONGEST} at most")
        if line:
            prompts.append(line)
    if not prompts:
        raise BadPrompts(f"{path}: holds no prompt; write one a line")
    return prompts if repeats else list(dict.fromkeys(prompts))


class Batches:
    """Endless batches of P prompts, each repeated G times as one group; a new shuffle each epoch.

    The position is two integers of `state()`: the order of an epoch depends on the prompts, the seed and the epoch alone.
    """

    def __init__(self, prompts: list[str], groups: int, group_size: int, *, seed: int):
        self.prompts, self.groups, self.group_size, self.seed = prompts, groups, group_size, seed
        self.epoch, self.position = 0, 0
        self._order: tuple[int, list[int]] = (-1, [])

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the prompts in their order."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "prompts": self.identity}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises BadPrompts where the position is one among other prompts."""
        if state["prompts"] != self.identity:
            raise BadPrompts(f"these {len(self.prompts)} prompts are not, in this order, those that the run began with")
        self.epoch, self.position = state["epoch"], state["position"]

    def _index(self) -> int:
        if self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            self._order = (self.epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        index = self._order[1][self.position]
        self.position += 1
        if self.position == len(self.prompts):
            self.epoch, self.position = self.epoch + 1, 0
        return index

    def next(self) -> tuple[list[str], torch.Tensor]:
        """(P * G prompts, group ids (P * G,) int64), the members of a group side by side."""
        chosen = [self.prompts[self._index()] for _ in range(self.groups)]
        group = torch.arange(self.groups).repeat_interleave(self.group_size)
        return [prompt for prompt in chosen for _ in range(self.group_size)], group

    def ahead(self, batches: int) -> list[str]:
        """The prompts of the next `batches` batches, each once; the position stays where it is."""
        other = Batches(self.prompts, self.groups, self.group_size, seed=self.seed)
        other.epoch, other.position = self.epoch, self.position
        found: dict[str, None] = {}
        for _ in range(batches * self.groups):
            if len(found) == len(self.prompts):
                break
            found[self.prompts[other._index()]] = None
        return list(found)
