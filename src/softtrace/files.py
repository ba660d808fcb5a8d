"""Result files that are whole or not there, in a folder that one run at a time writes to."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from softtrace.checks import refuse_empty
from softtrace.errors import OutputExistsError, OutputNotWritableError

if sys.platform != "win32":
    import fcntl

P = ParamSpec("P")
R = TypeVar("R")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""A disk, or what a user may have of it, is full."""

_NUMBER = r"(?:-?[0-9][0-9.eE+-]*|null)"
# Inside a string of JSON there is no line break, so this finds lists alone.
_NUMBERS = re.compile(rf"\[\n\s*{_NUMBER}(?:,\n\s*{_NUMBER})*\n\s*\]")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; what was written there replaces ``path``.

    The replacement happens at the end of a block that did not raise, after the data reached the
    disk. After an exception the temporary file is removed and ``path`` is as it was.

    Raises:
        FileNotFoundError: the folder does not exist, or the block wrote nothing.
    """
    path = Path(path)
    # A name of our own instead of tempfile's: those files can be read by their owner only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_names(path.parent)


def write_json(path: Path | str, obj: Any) -> None:
    """Write ``obj`` as JSON (UTF-8) atomically; NaN and infinity, which JSON lacks, become null.

    A list of numbers is one line.
    """
    # Serialise first: an object that is not JSON must not get as far as a file.
    text = json.dumps(finite(obj), indent=1, ensure_ascii=False, allow_nan=False)
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    write_text(path, text)


def write_text(path: Path | str, text: str) -> None:
    """Write lines (UTF-8) atomically, the last one closed by a line break of its own."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


LOCK = ".softtrace.lock"
"""A file of the folder that a run is writing to; it goes when the run ends."""


@contextmanager
def claimed(folder: Path | str) -> Iterator[None]:
    """Make ``folder`` this run's own; what was made for that and stayed empty is removed again.

    The system holds the lock and lets it go with the process, however that ends: a killed run
    leaves a small file behind, which nobody minds. Where files cannot be locked (on Windows, on
    some network file systems) no other run is refused.

    Raises:
        OutputExistsError: it is a file, or another run writes to it.
        OutputNotWritableError: nothing may be written to it, or where it would be made.
    """
    folder = check_output(folder, overwrite=True)
    if sys.platform == "win32":
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        _make(folder)
        descriptor = _lock(folder / LOCK)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # as long as it is locked
            os.close(descriptor)
    finally:
        for each in made:
            with suppress(OSError):  # a folder that holds something stays
                each.rmdir()


def _make(folder: Path) -> None:
    """Make the folder; some that nothing forbids to write to take none, such as those of /proc.

    Raises:
        OutputNotWritableError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise  # said by whoever catches that of all that is written
        raise OutputNotWritableError(
            f"{folder}: cannot be made ({error.strerror}); choose another folder"
        ) from error


def claims_out(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command run with the folder of its parameter ``out`` :func:`claimed`."""

    @wraps(command)
    def claiming(*args: P.args, **kwargs: P.kwargs) -> R:
        with claimed(signature(command).bind(*args, **kwargs).arguments["out"]):
            return command(*args, **kwargs)

    return claiming


def _lock(path: Path) -> int:
    """The descriptor of the file that is locked; it is made where it is missing."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run that ended has just removed the folder
            continue
        try:
            _flock(descriptor, path)
            # Or the run that had it has removed it since it was opened here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # no locks on this file system
        owner = path.read_text(encoding="utf-8", errors="replace")
        raise OutputExistsError(
            f"{path.parent}: found another run that is writing to it (process {owner}); choose "
            "another folder, or wait for its end"
        ) from error


OVERWRITE = "overwrite=True (--overwrite true)"


def check_output(folder: Path | str, overwrite: bool, otherwise: str = OVERWRITE) -> Path:
    """Return ``folder`` if :func:`prepare_output` would take it; creates nothing.

    For runs that load and compute for long before they have something to write.

    Args:
        folder, overwrite: see :func:`prepare_output`.
        otherwise: what the error offers to who wants this very folder.

    Raises:
        InvalidInputError: the path is empty, which a path would take for the working directory.
    """
    refuse_empty("out", folder, "a folder to write to ('.' for this one)")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder}: found a file, expected a folder to write to")
    held = sum(each.name != LOCK for each in folder.iterdir()) if folder.is_dir() else 0
    if held and not overwrite:
        raise OutputExistsError(
            f"{folder}: found {held} {'entry' if held == 1 else 'entries'}, expected a new or "
            f"empty folder; choose another one, or pass {otherwise}"
        )
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise OutputExistsError(
            f"{folder}: found that {nearest} is a file, in which no folder can be made; choose "
            "another folder"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputNotWritableError(
            f"{folder}: found that {nearest} may not be written to; choose another folder, or "
            "change its permissions"
        )
    return folder


def prepare_output(folder: Path | str, overwrite: bool) -> Path:
    """Create ``folder`` with its parents, or accept one that is empty, and return it.

    Args:
        folder: where results will be written.
        overwrite: also accept a folder that holds files. Nothing is deleted: files that the run
            writes are replaced, others stay.

    Raises:
        OutputExistsError: ``folder`` is a file or would be in one, or it holds files and
            ``overwrite`` is False.
        OutputNotWritableError: nothing may be written to it, or where it would be made.
    """
    folder = check_output(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync(path: Path, flags: int = os.O_RDWR) -> None:
    """Wait until what was written to a file, or a folder opened read-only, is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Wait until renamed files of a folder have their new names on the disk, as far as it can."""
    with suppress(OSError):  # some systems cannot open or sync a folder
        sync(folder, os.O_RDONLY)


def finite(obj: Any) -> Any:
    """``obj`` as JSON has it: NaN and infinity are None, also inside of lists and objects."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite(value) for value in obj]
    return obj
