"""What one process tells the others of its failure, so that nobody waits and all say why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from softtrace import errors
from softtrace.errors import SofttraceError

Told = tuple[str, str]
"""The name of an error's class in :mod:`softtrace.errors`, and its words."""


def in_group() -> bool:
    """Whether this is one of the processes of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def told(failure: Exception | None) -> Told | None:
    """The class and the words of an error: softtrace's own, or else a ``SofttraceError``.

    Not the error itself: one that cannot be sent, or made again, would leave the others waiting.
    """
    if failure is None:
        return None
    if not isinstance(failure, SofttraceError):
        return SofttraceError.__name__, f"{type(failure).__name__}: {failure}"
    known = (kind.__name__ for kind in type(failure).__mro__ if kind.__module__ == errors.__name__)
    return next(known), str(failure)


def of_another(index: int, count: int, heard: Told) -> SofttraceError:
    """What process ``index`` of ``count`` raised, to be raised here."""
    name, message = heard
    kind: type[SofttraceError] = getattr(errors, name)
    return kind(f"process {index} (of 0 to {count - 1}) failed: {message}")


def raise_everywhere(failure: Exception | None) -> None:
    """Raise on every process what failed on any; all of them have to call this.

    Where torch has no process group there is only this process.

    Args:
        failure: of this process; None if it ended well.

    Raises:
        Exception: ``failure`` itself, on the process that it is of.
        SofttraceError: on those that did not fail, if others did: what the first of these raised,
            of the class that it has there, where softtrace raised it.
    """
    heard: list[Told | None] = []
    if in_group():
        heard = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(heard, told(failure))
    if failure is not None:
        raise failure
    for index, each in enumerate(heard):
        if each is not None:
            raise of_another(index, len(heard), each)


@contextmanager
def agreed(together: bool) -> Iterator[None]:
    """Raise on every process what softtrace raises inside on any.

    Args:
        together: whether all processes come here; if not, an error is this one's alone.

    Raises:
        SofttraceError: see :func:`raise_everywhere`.
    """
    failure: SofttraceError | None = None
    try:
        yield
    except SofttraceError as error:
        if not together:
            raise
        failure = error
    if together:
        raise_everywhere(failure)
