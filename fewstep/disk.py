"""Writing to a disk: what it refuses is named, and what was there is lost to nothing that fails half way."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # what a disk answers that takes no more

LOCK = ".lock"
TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")  # a name that `beside` gives
DAY = 86_400  # seconds


def errno_of(error: Exception) -> int | None:
    """The system's number of a failed write; safetensors has it in the text of an error of its own, as `(os error 28)`, by Windows' own
    numbers there, and what copies folders in that of each file's, as `[Errno 28]`."""
    if isinstance(error, shutil.Error):
        found = re.search(r"\[Errno (\d+)\]", str(error))
        return int(found[1]) if found else None
    if isinstance(error, OSError):
        return error.errno
    # by its name, for its module is not imported here
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(found[1]), "", None, int(found[1])).errno if found else None  # the last is Windows' number, ignored elsewhere


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
        root = cache_root()
        movable = root is not None and folder.absolute().is_relative_to(root.absolute())
        advice = "; XDG_CACHE_HOME moves what is kept there to another disk" if movable else ""
        raise OSError(number, f"could not be written to: {os.strerror(number)}{advice}", str(folder)) from error


def check_writable(name: str, folder: Path) -> None:
    """Makes the folder and tries to write in it. name: of the flag or field that gave it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tried = folder / f".writable.{os.getpid()}"  # no name of tempfile's: it tries others for ever where Windows lets none be made
        tried.touch()
        tried.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{name}: cannot write to {folder} ({error.strerror})") from error


def cache_root() -> Path | None:
    """Where all lies that can be made again; None for a user without a home, as a container's that is a number alone."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"
    except RuntimeError:
        return None


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept that can be made again. Raises UserError where there is no such place."""
    root = cache_root()
    if root is None:
        raise UserError(f"XDG_CACHE_HOME: not set, and there is no home folder; set it to a folder under which fewstep can keep its {kind}")
    return root / kind


def check_cache(kind: str, what: str) -> None:
    """`check_writable` of where `what` is kept, before it is made. Raises UserError that says how to keep it elsewhere."""
    check_writable(f"XDG_CACHE_HOME, a folder under which {what} are kept", cache_folder(kind))


@contextmanager
def alone(name: str, folder: Path) -> Iterator[None]:
    """Within, no other process is so in the folder; the system frees it where this one is killed. name: of the flag or field that gave it.

    Raises UserError where another one is.
    """
    from filelock import FileLock, Timeout  # a reward's server may live without

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{name}: another process is at work in {folder}; wait for it, or name another folder") from error
    except (OSError, NotImplementedError) as error:  # as on a network disk without locks
        warnings.warn(f"{folder} cannot be locked ({error}): see to it that no second run is started there", stacklevel=3)
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows unlinks no open file: filelock does it there, after the release
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: whoever comes next makes one anew
        lock.release()


def is_one(path: Path, other: Path) -> bool:
    """Whether both name one file or folder that is there, as OUT and out do on a Mac."""
    return path.exists() and other.exists() and path.samefile(other)


def visible(folder: str | Path, *patterns: str) -> list[Path]:
    """What in a folder fits a pattern, sorted by its name there: a Windows path compares without regard to case.

    What is hidden is left out: on a disk that is not its own a Mac lays a `._X` beside each X, which is none of what the name says.
    """

    def parts(path: Path) -> tuple[str, ...]:
        return path.relative_to(folder).parts

    found = {path for pattern in patterns for path in Path(folder).glob(pattern)}
    return sorted((path for path in found if not any(part.startswith(".") for part in parts(path))), key=parts)


def rename(path: Path, target: Path) -> None:
    """`Path.replace`, tried for some seconds: on Windows it fails for as long as anything, such as a virus scanner, reads the file, one in
    the folder, or the file whose place it takes."""
    for pause in (0.1, 0.5, 2.0):
        try:
            path.replace(target)
            return
        except PermissionError:
            time.sleep(pause)
    path.replace(target)


def sync(path: Path) -> None:
    """Force a file to disk, or a folder's entries where its disk can: network and shared disks refuse that (SMB, VirtualBox's, those under
    WSL), each by another number, and Windows opens no folder. What was written lies in the files."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs no file that is open for reading alone
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def give_usual_mode(path: Path) -> None:
    """The mode that the umask gives to any new file: safetensors writes its own for nobody but their owner."""
    fresh = beside(path)
    try:
        fresh.touch()  # the umask itself can only be read by setting it, for all threads
        usual = stat.S_IMODE(fresh.stat().st_mode)
    finally:
        fresh.unlink(missing_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != usual:
        with suppress(OSError):  # not every disk lets modes be set, and a file that others cannot read is better than none
            path.chmod(usual)


def beside(path: Path) -> Path:
    """A temporary name in the same folder."""
    # two machines that share the disk may have given their processes one number, as containers do
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def clear(folder: Path) -> None:
    """Remove the files that a killed process left half written in a folder: temporary ones that nobody has written to for a day."""
    for path in folder.glob(".*"):
        with suppress(OSError):  # another process may be at it
            if TEMPORARY.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime > DAY:
                path.unlink()


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name beside its own, then rename: a reader sees the old or the new, never a half. It has the usual
    mode, whatever wrote it.

    Raises OSError that names the folder where the disk takes no more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    with naming(path.parent):
        try:
            write(temporary)
            give_usual_mode(temporary)
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace` of a whole text, UTF-8, forced to disk before its name is: not even a machine that loses its power leaves it empty."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)

    replace(path, write)
    sync(path.parent)
