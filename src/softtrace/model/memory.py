"""Where memory runs out: work is halved and continues, or what would fit is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)

T = TypeVar("T")


_SAID = (
    "CUDA error: out of memory",  # the driver's, where a kernel or a handle found no room
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: not enough memory",  # Windows
)
"""What errors say that accelerate does not take for memory's."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of an accelerator or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(said in str(error) for said in _SAID)


def attempt(work: Callable[[], T]) -> T | None:
    """What some work gives; None where memory ran out, with nothing of it left there."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # The traceback, which holds the tensors of the work, ended with the block before.
    clear_device_cache(garbage_collection=True)
    return None


class Portions:
    """How many things are worked on at a time: halved where memory runs out, and kept so small.

    Args:
        size: to begin with, at least 1.
        unit: what they are, such as "sequence(s)".
        otherwise: how it continues where a single one does not fit, for the end of a sentence; None
            where it cannot.
    """

    def __init__(self, size: int, unit: str, otherwise: str | None = None) -> None:
        self.size = size
        self.unit = unit
        self.otherwise = otherwise

    def each(
        self,
        first: int,
        end: int,
        work: Callable[[int, int], T],
        alone: Callable[[int], T] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """Work on the things ``first`` to ``end - 1``.

        Args:
            first, end: numbers of the things.
            work: on the things from a number up to another.
            alone: what is done about a thing that does not fit even by itself; None lets the error
                of its work through.

        Yields:
            How many things were worked on, and what the work gave.
        """
        while first < end:
            stop = min(first + self.size, end)
            if not self.size:
                yield 1, work(first, first + 1) if alone is None else alone(first)
                first += 1
            elif (found := attempt(partial(work, first, stop))) is not None:
                yield stop - first, found
                first = stop
            else:
                self.size = (stop - first) // 2
                how = f"{self.size} at a time" if self.size else self.otherwise
                if how is not None:
                    logger.warning(
                        "memory ran out at %d %s; continuing with %s", stop - first, self.unit, how
                    )


def half_that_fits(size: int, least: int, work: Callable[[int], T]) -> int:
    """The largest of a half, a quarter and so on of a size that fits; 0 where none does.

    Args:
        size: that did not fit.
        least: the smallest that is tried.
        work: of a size.
    """
    while (size := size // 2) >= least:
        if attempt(partial(work, size)) is not None:
            return size
    return 0
