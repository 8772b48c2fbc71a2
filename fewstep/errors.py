"""Mistakes of the person who runs fewstep, in words for them."""

from __future__ import annotations

import difflib
import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave; its message is all they need to see. Exit code 2."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # what a disk answers that takes no more


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """The system names no file where a write to an open one fails: name the folder that it lies in."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK or error.filename is not None:
            raise
        raise OSError(error.errno, f"could not be written to: {error.strerror}", str(folder)) from error


def check_writable(name: str, folder: Path) -> None:
    """Makes the folder and tries to write in it. name: of the flag or field that gave it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{name}: cannot write to {folder} ({error.strerror})") from error


def nearest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
