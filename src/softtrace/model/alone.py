"""Runs of ours on one model, one after another: its hooks and flags are the same in all threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOOKING_UP = threading.Lock()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread is inside for the same model; within one thread it nests.

    What our runs hang on a model, and switch in it, another thread's run would take for its own.
    """
    with _LOOKING_UP:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield
