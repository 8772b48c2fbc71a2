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


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """The system names no file where a write to an open one fails, and safetensors raises an error of its own with the system's number in
    its text: both as an OSError that names the folder which the file lies in."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and error.filename is None else None
        # by its name, for its module is not imported here
        if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        if number not in DISK:
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
