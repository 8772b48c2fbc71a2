"""How this process was started: by itself, or as one of several by torchrun or `accelerate launch`; and where what it prints goes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


def launched() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) of a process started by itself."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def place() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def neighbours() -> int:
    """How many processes of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def torchrun_limit() -> str:
    """For how long torchrun lets its processes live after a signal that it passed on, as the end of a sentence; empty without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)
    return f"; where torchrun was told to stop, it kills after its --shutdown-timeout ({seconds} s unless that was given)"


@contextlib.contextmanager
def first_alone_prints() -> Iterator[None]:
    """Within, what processes other than the first print goes nowhere; errors are each one's own, and warnings too
    until they join (`ranks.Ranks.join`)."""
    if launched()[0] == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def anything_prints() -> Iterator[None]:
    """Within, what stdout has no character for is printed as a question mark: on Windows a file or a pipe takes those of a code page, which
    has no arrows, and the word of a prompt may be in any script."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):  # a notebook's takes all
        yield
        return
    before = out.errors
    out.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of a pipe that nobody reads any more
            out.reconfigure(errors=before)
