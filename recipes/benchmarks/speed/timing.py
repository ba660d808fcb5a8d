"""Seconds of a call, and what many of them come to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call, an accelerator's queue included."""
    settle()
    began = time.perf_counter()
    function()
    settle()
    return time.perf_counter() - began


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
