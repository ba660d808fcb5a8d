"""Strength over training: a pure function of the global step, so a resumed run needs no state."""

from __future__ import annotations

from dataclasses import dataclass

from softtrace.batch import check_range
from softtrace.errors import InvalidInputError


@dataclass(frozen=True)
class StrengthSchedule:
    """0 before ``start_step``, a linear rise over ``warmup_steps``, ``strength`` after.

    Attributes:
        strength: final weight of the term, >= 0.
        start_step: first global step with the term.
        warmup_steps: steps of the linear rise.

    Raises:
        InvalidInputError: a negative number.
    """

    strength: float
    start_step: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0.0, float("inf"), open_high=True)
        for name in ("start_step", "warmup_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise InvalidInputError(f"{name}: found {steps!r}, allowed are integers from 0")

    def __call__(self, step: int) -> float:
        """Strength at a global step (optimiser steps done so far)."""
        if step < self.start_step:
            return 0.0
        done = step - self.start_step + 1
        return self.strength * min(1.0, done / (self.warmup_steps + 1))
