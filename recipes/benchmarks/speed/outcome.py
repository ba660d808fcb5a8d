"""Measurements that may run out of time or memory, which is a result too."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class TooLong(BaseException):
    """A row took longer than is allowed; handlers of errors shall not see it."""


@contextmanager
def limited(allowed: float) -> Iterator[None]:
    """Raise :class:`TooLong` after so many seconds, between two operations."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, allowed)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """What some work found, or why it found nothing: memory, time, or an error."""
    try:
        with limited(limit):
            return work()
    except TooLong:
        return {"error": f"not done in {limit:g} s"}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # the rows after it are measured all the same
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
