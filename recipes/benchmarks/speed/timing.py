"""Seconds of a call, and what many of them come to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call by a clock, wall-clock time by default; an accelerator's queue included."""
    settle()
    began = clock()
    function()
    settle()
    return clock() - began


def processor_clock(device: torch.device) -> Callable[[], float]:
    """On a CPU seconds that neighbours do not prolong: those of all threads over their number."""
    if device.type != "cpu":
        return time.perf_counter
    return lambda: time.process_time() / torch.get_num_threads()


def settle() -> None:
    """Wait until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and extremes."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }
