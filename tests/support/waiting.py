"""Waiting for what happens, and never for a time in which it ought to have happened.

Another process may be slow, and so may the machine: a test waits for the thing itself, and gives up
only where nothing could be this slow. How long that took is no result of a test.
"""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: seconds after which something hangs: many times what the slowest process takes on a busy machine,
#: half of what pytest gives a test (pyproject.toml), and less than torch waits for a lost process
PATIENCE = 600.0


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Return as soon as ``happened()`` is true.

    Args:
        happened: is asked many times a second; what it reads has to be there at once or not at
            all, as a file that was renamed into its place.
        what: names it where it does not happen.

    Raises:
        TimeoutError: it did not happen.
    """
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.02)


def held_port() -> socket.socket:
    """A socket whose port nobody else is given for as long as it is open; close it in the end.

    A port that is looked up, let go, and listened at a moment later may be another's by then. This
    one stays bound: who asks the system for any port gets a different one, and who is told the
    number can listen there all the same, because both sides say ``SO_REUSEADDR`` (as torch's store
    and Chromium's driver do) and nobody listens yet.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def port_of(held: socket.socket) -> int:
    """The number to be told."""
    number: int = held.getsockname()[1]
    return number


@contextmanager
def no_collector() -> Iterator[None]:
    """Nothing dies by the garbage collector in here: what is gone went with its last reference.

    When the collector runs depends on all that ran before, and what it frees then, too.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
