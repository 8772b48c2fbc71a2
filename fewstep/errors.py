"""What ends a command with its message and no traceback."""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave; its message is all they need to see. Exit code 2."""


class RewardError(ValueError):
    """A reward that does not keep its contract; the message names it and says what it must return."""


class NumericalError(FloatingPointError):
    """A number that nothing can go on with, NaN as a rule; the message says what gave it and what to do about that."""


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


def sentence(text: str) -> str:
    """A message with its end, for another sentence to follow: one that asks has it."""
    return text if text.endswith("?") else f"{text}."


def first_words(error: BaseException) -> str:
    """Of torch's complaint about memory what was asked for; it goes on about its allocator."""
    return ". ".join(str(error).split(". ")[:2])


def as_word(path: Any) -> str:
    """A path as one word of a command for the user to give, quoted where their shell needs it."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def nearest(word: str, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
