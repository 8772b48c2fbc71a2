"""How this process was started: by itself, or as one of several by torchrun or `accelerate launch`; where what it prints goes, and what
of it a call gives back to a caller who goes on, as in a notebook."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

UNDO: ContextVar[contextlib.ExitStack | None] = ContextVar("UNDO", default=None)  # what the call that lasts has to put back


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
def sigterm_ends_as_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM ends this process as Ctrl-C does: it says what is kept, and nothing half written stays. A handler of the caller's own
    does too. Not of several processes: what waits for another one in torch's own code hears no handler, and must end at once."""
    main = threading.current_thread() is threading.main_thread()
    if not main or launched()[1] > 1 or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def leaves_no_trace() -> Iterator[None]:
    """Within, the process is fewstep's own: a caller's settings of torch do not reach in. After it the caller has back these, the random
    numbers of torch, the filters of warnings, and what was to be `put_back`."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        if "torch" in sys.modules:  # else nobody has set anything, and a mistake is told without it
            undo.enter_context(torch_as_new())
        undo.callback(UNDO.reset, UNDO.set(undo))
        yield


@contextlib.contextmanager
def torch_as_new() -> Iterator[None]:
    """Within, torch has gradients, float32, the CPU and no autocast unless told otherwise; its random numbers and its current GPU are as
    they were after it."""
    import torch

    before, gpus = torch.get_default_dtype(), range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as held:
        held.enter_context(torch.random.fork_rng(gpus))  # unasked it would warn where they are several
        if gpus:
            held.enter_context(torch.cuda.device(torch.cuda.current_device()))
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        held.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float32)
        yield


def put_back(how: Callable[..., Any], *arguments: Any) -> None:
    """Is called when the call ends that lasts (`leaves_no_trace`), the last given first; never where there is none, as in a process of a
    comparison."""
    undo = UNDO.get()
    if undo is not None:
        undo.callback(how, *arguments)


def set_variable(name: str, value: str) -> None:
    """Of the environment, for as long as the call lasts."""
    before = os.environ.get(name)
    if before is None:
        put_back(os.environ.pop, name, None)
    else:
        put_back(os.environ.__setitem__, name, before)
    os.environ[name] = value


# what a write is answered whose reader is gone: a pipe's, a terminal's that was closed, a pipe's on Windows
GONE = (errno.EPIPE, errno.EIO, errno.EINVAL)


class Outlasting(io.FileIO):
    """The file under a stream; once whoever reads it is gone, stderr takes its place, which says so, and nothing where that is gone too."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
        give_way(self.fileno())
        return super().write(data)


def give_way(number: int) -> None:
    """Put stderr, or nothing where that takes no word, in the place of an open file."""
    try:
        error = sys.stderr.fileno()
        os.write(error, b"fewstep: nobody reads what is printed any more: the rest is printed here\n")
        os.dup2(error, number)
    except (OSError, AttributeError):  # gone as well, or there was none
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), number)


def outlasting(stream: Any) -> Any:
    """A text stream as one over an `Outlasting` file; what lies over none, as a notebook's and a Windows console's, as it is."""
    held = getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(getattr(held, "raw", held), io.FileIO):
        return stream
    stream.flush()
    raw = Outlasting(os.dup(stream.fileno()), "wb")  # its own, which a library's log may hold for longer than the caller's file is open
    buffer = io.BufferedWriter(raw) if hasattr(held, "raw") else raw  # none under python -u
    how = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
    return io.TextIOWrapper(buffer, **how, write_through=stream.write_through)


@contextlib.contextmanager
def anything_prints() -> Iterator[None]:
    """Within, what stdout has no character for is printed as a question mark: on Windows a file or a pipe takes those of a code page, which
    has no arrows, and the word of a prompt may be in any script. And who reads it may go, as a `tee` that the same Ctrl-C ends."""
    given = sys.stdout, sys.stderr
    out, error = sys.stdout, sys.stderr = outlasting(given[0]), outlasting(given[1])
    before = out.errors if isinstance(out, io.TextIOWrapper) else None  # a notebook's takes all
    if before is not None:
        out.reconfigure(errors="replace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = given
        with contextlib.suppress(OSError):  # of a full disk under it: what could be written has been
            for stream, own in zip((out, error), given, strict=True):
                if stream is not own:
                    stream.flush()
            if before is not None:
                out.reconfigure(errors=before)
