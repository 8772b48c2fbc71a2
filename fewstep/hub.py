"""How a repository of the Hugging Face hub is named, by all that may be a folder or one. Nothing here asks the hub."""

from __future__ import annotations

import re
from pathlib import Path

NAME = r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?"  # owner/name, perhaps @revision
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_path(source: str) -> bool:
    """Whether it is there, or begins as nothing but a path does."""
    return source.startswith((".", "/", "~")) or Path(source).exists()


def parts(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of what can be `owner/name[@revision]`; None for anything else."""
    found = re.fullmatch(NAME, source)
    return None if found is None or is_path(source) else (found[1], found[2])


def split(source: str) -> tuple[str, str | None]:
    """(what a library's `from_pretrained` is given, its revision or None) of a folder or hub id."""
    return parts(source) or (source, None)
