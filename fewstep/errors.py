"""Mistakes of the person who runs fewstep, in words for them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave; its message is all they need to see. Exit code 2."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # what a disk answers that takes no more


def errno_of(error: Exception) -> int | None:
    """The system's number of a failed write; safetensors has it in the text of an error of its own, as `(os error 28)`."""
    if isinstance(error, OSError):
        return error.errno
    # by its name, for its module is not imported here
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """The system names no file where a write to an open one fails, nor does safetensors: as an OSError that names the folder in which the
    file lies."""
    try:
        yield
    except Exception as error:
        number = errno_of(error)
        if number not in DISK or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, f"could not be written to: {os.strerror(number)}", str(folder)) from error


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
