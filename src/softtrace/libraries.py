"""What a library refuses to do, told from what is a bug: a missing package, device or kernel."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from types import FrameType

from softtrace.errors import SofttraceError

_OWN = __name__.partition(".")[0]
# What compiled code raises on purpose, where no line of Python says so.
_SPOKEN = (ImportError, OSError, RuntimeError, ValueError)


@contextmanager
def refusals(kind: type[SofttraceError], about: str, advice: str = "") -> Iterator[None]:
    """Raise as ``kind``, in one line, what a library refuses inside; bugs pass as they are.

    Args:
        kind: of the error.
        about: what its line begins with.
        advice: what it ends with.
    """
    try:
        yield
    except Exception as error:
        said = refusal(error)
        if said is None:
            raise
        raise kind(f"{about}: {said}{advice}") from error


def refusal(error: Exception) -> str | None:
    """The message of an error that a library raised on purpose, in one line; None for any other.

    On purpose means by a ``raise`` statement of its own, about what softtrace passed to it. An
    error that Python raised, such as the ``KeyError`` of a dictionary, is somebody's bug.
    """
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if not from_library(error) or not (isinstance(error, _SPOKEN) or line.startswith("raise ")):
        return None
    return one_line(error) or type(error).__name__


def one_line(error: BaseException) -> str:
    """All that an error says, without its line breaks."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of what an error says; libraries write pages."""
    return str(error).strip().partition("\n")[0]


def from_library(error: Exception) -> bool:
    """Whether an error was raised inside of a library that softtrace called.

    Not if the call led back into softtrace, or through a user's class: then it may be theirs.

    Args:
        error: with its traceback, which begins in softtrace.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    called = list(dropwhile(_is_own, frames))
    return bool(called) and all(map(_is_library, called))


def missing(error: ImportError | NotImplementedError) -> str | None:
    """What this installation or machine lacks, in one line; None for a bug, or a user's own code.

    Args:
        error: wherever it came from, with a traceback that begins in softtrace.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not all(_is_own(frame) or _is_library(frame) for frame in frames):
        return None
    said = one_line(error)
    if isinstance(error, ImportError):
        ours = (error.name or "").partition(".")[0] == _OWN
        return None if ours else f"{said}; install what is missing"
    if _is_own(frames[-1]):
        return None
    return f"{said} (choose another attention kernel, device or number format)"


def _is_own(frame: FrameType) -> bool:
    return _package(frame) == _OWN


def _is_library(frame: FrameType) -> bool:
    installed = {"site-packages", "dist-packages"} & set(Path(frame.f_code.co_filename).parts)
    return not _is_own(frame) and (bool(installed) or _package(frame) in sys.stdlib_module_names)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
