"""Prompt conditions on disk, computed once for each text encoder and prompt."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fewstep.denoiser import Cond
from fewstep.disk import cache_folder, clear, replace
from fewstep.errors import NumericalError
from fewstep.models import content

FIRST = 32  # prompts after which the room that the rest takes is reckoned; fewer are encoded without a progress bar


def fingerprint(parts: list[Any]) -> str:
    """SHA-256 of what conditions depend on: modules by configuration and weights, tokenizers by their full description, the rest as JSON.
    Where the parts lie does not count: a teacher that was moved finds its conditions.

    The versions of fewstep, diffusers and transformers count too: they hold the code that encodes.
    """
    digest = hashlib.sha256(json.dumps([version(name) for name in ("fewstep", "diffusers", "transformers")]).encode())
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(json.dumps(content(part.config.to_dict()), sort_keys=True, default=str).encode())
            for name, value in part.state_dict().items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif hasattr(part, "backend_tokenizer"):
            digest.update(part.backend_tokenizer.to_str().encode())
            digest.update(
                json.dumps([part.model_max_length, part.padding_side, part.special_tokens_map, part.chat_template], default=str).encode()
            )
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def is_finite(cond: Cond) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in cond.values())


class Embeddings:
    """`embeddings[prompt]` -> that prompt's conditions, on the CPU, each with a first dimension of 1.

    encode: makes them; parts: what they depend on beside the prompt (asked when the first one is needed); folder: of the files,
    by default under $XDG_CACHE_HOME. A file that cannot be read, or holds NaN, is made anew, and a warning names it. Raises NumericalError
    for conditions that are not finite, which are not kept.
    """

    def __init__(self, encode: Callable[[str], Cond], parts: Callable[[], list[Any]], folder: Path | None = None):
        self.encode, self.parts, self.root = encode, parts, folder

    @cached_property
    def folder(self) -> Path:
        folder = (self.root or cache_folder("embeddings")) / fingerprint(self.parts())[:32]  # not before: drawing a student needs none
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        return folder

    def path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def __getitem__(self, prompt: str) -> Cond:
        path = self.path(prompt)
        if path.is_file():
            try:
                kept = load_file(path)
                if is_finite(kept):
                    return kept
                problem = "holds NaN or inf"  # as an earlier version kept it
            except (OSError, SafetensorError) as error:
                problem = f"cannot be read ({error})"
            warnings.warn(f"{path}: {problem}; encoding its prompt again", stacklevel=2)
        cond = {key: value.detach().cpu().contiguous() for key, value in self.encode(prompt).items()}
        if not is_finite(cond):
            raise NumericalError(
                f"the conditions of the prompt {prompt!r} hold NaN or inf, and are not kept. Look at the weights of the teacher's text "
                "encoder"
            )
        replace(path, lambda temporary: save_file(cond, temporary))
        return cond

    def missing(self, prompts: list[str]) -> list[str]:
        """Those of the prompts that have no file yet, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).is_file()]

    def fill(self, prompts: list[str], *, sharers: int = 1) -> None:
        """Encode the prompts, none of which has a file yet. Raises OSError as soon as the first show that the disk is too small.

        sharers: processes that fill it, each with as many.
        """
        written = 0
        for done, prompt in enumerate(track(prompts, "conditions of prompts", disable=len(prompts) < FIRST), 1):
            self[prompt]
            written += self.path(prompt).stat().st_size
            if done == FIRST:
                self.check_room((len(prompts) - done) * sharers, written // done)

    def check_room(self, prompts: int, each: int) -> None:
        """Raises OSError where so many more prompts of `each` bytes do not find room."""
        free = shutil.disk_usage(self.folder).free
        if prompts * each > free:
            words = f"the conditions of {prompts} more prompts take {prompts * each / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            advice = "set XDG_CACHE_HOME to a larger disk, or give fewer prompts or updates"
            raise OSError(errno.ENOSPC, f"{words}: {advice}", str(self.folder))
