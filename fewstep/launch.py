"""How this process was started: by itself, or as one of several by torchrun or `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
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


@contextlib.contextmanager
def first_alone_prints() -> Iterator[None]:
    """Within, what processes other than the first print goes nowhere; errors are each one's own, and warnings too
    until they join (`ranks.Ranks.join`)."""
    if launched()[0] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
