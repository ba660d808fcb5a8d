"""Where the time of an evaluation goes; a part of the scripts that measure it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import softtrace.evaluation.measure as measuring
import softtrace.evaluation.samples as sampling
from recipes.benchmarks.speed.timing import seconds
from softtrace.anatomy.readout import Readout
from softtrace.density import sweep
from softtrace.tracing.runner import Runner

MASKED = "masked runs", "their logits"

PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "masked runs": ((sweep, "read_masked"), (sampling, "read_masked")),
    "their logits": ((Readout, "logits"),),
    "recording": ((Runner, "record"),),
    "masks": ((sweep, "hard_masks"), (sampling, "hard_masks")),
    "sizes": (
        *(
            (sweep, name)
            for name in (
                "edge_counts",
                "held_traces_at",
                "total_edges",
                "traces_at",
                "traces_at_each",
            )
        ),
        *((sampling, name) for name in ("total_edges", "traces_at")),
    ),
    "distances": (
        *((sweep, name) for name in ("variation_from", "nucleus_recovered")),
        (sampling, "variation_from"),
    ),
    "exits": ((measuring, "exit_agreement"), (sampling, "exit_agreement")),
}
"""What of an evaluation is timed, and by which names its modules call it."""


class Parts:
    """Seconds of each of :data:`PARTS` by a clock; what one calls of another is its own."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.masked_runs = 0
        self._inside = False

    @property
    def masked(self) -> float:
        """Seconds of masked runs alone: forwards under masks, logits of what is explained."""
        return sum(self.seconds[name] for name in MASKED)

    def over_masked(self, whole: float) -> dict[str, float]:
        """Seconds of every part, and of what is none of them, over those of the masked runs."""
        rest = whole - self.seconds.total()
        return {
            name: taken / self.masked
            for name, taken in {**dict.fromkeys(PARTS, 0.0), **self.seconds, "rest": rest}.items()
        }

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are counted for a part."""

        def call(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            found: list[Any] = []
            self._inside = True
            try:
                taken = seconds(lambda: found.append(function(*args, **options)), self.clock)
            finally:
                self._inside = False
            self.seconds[name] += taken
            self.masked_runs += name == MASKED[0]
            return found[0]

        return call


@contextmanager
def parts_timed(clock: Callable[[], float] = time.perf_counter) -> Iterator[Parts]:
    """Time the parts of all evaluations inside."""
    parts = Parts(clock)
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                timed = parts.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
        yield parts
