"""Strength over training: a pure function of the global step, so a resumed run needs no state."""

from __future__ import annotations

from dataclasses import dataclass

from softtrace.checks import check_least, check_range


@dataclass(frozen=True)
class StrengthSchedule:
    """0 before ``start_step``, a linear rise over ``warmup_steps``, ``strength`` after.

    With ``every`` k all but each k-th step have 0, and that one k times the strength, so that the
    mean over k steps stays. The first of these is ``offset`` steps after the start.

    Attributes:
        strength: final weight of the term, >= 0.
        start_step: first global step with the term.
        warmup_steps: steps of the linear rise.
        every: steps from one with the term to the next, >= 1.
        offset: of these steps, 0 to ``every - 1``.

    Raises:
        InvalidInputError: a number outside its range.
    """

    strength: float
    start_step: int = 0
    warmup_steps: int = 0
    every: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        check_range("strength", self.strength, 0.0, float("inf"), open_high=True)
        for name, least in (("start_step", 0), ("warmup_steps", 0), ("every", 1)):
            check_least(name, getattr(self, name), least)

    def comes(self, step: int) -> bool:
        """Whether a global step is a k-th one, also before the start."""
        return (step - self.start_step) % self.every == self.offset

    def __call__(self, step: int) -> float:
        """Strength at a global step (optimiser steps done so far)."""
        done = step - self.start_step
        if done < 0 or not self.comes(step):
            return 0.0
        return self.every * self.strength * min(1.0, (done + 1) / (self.warmup_steps + 1))
