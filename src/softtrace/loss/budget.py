"""What the term may cost: its strength follows the held-out loss.

What plain fine-tuning would have reached cannot be known in one run, so its losses are given. Every
measurement multiplies the strength by ``exp(gain · (1 - expected))``, where ``expected`` is the
share of the budget that will be spent at the next measurement if the excess continues as it went
since the last one. Looking ahead is what keeps the strength from swinging: a loss answers to a
strength late, and the later the smaller the learning rate is. The gain is twice as large where the
budget is passed. On real models a strength costs more the longer a training lasts, and with one
gain for both sides it was followed too late: 1.1 times the budget was spent in the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softtrace.checks import check_least, check_range
from softtrace.errors import InvalidInputError
from softtrace.percent import percent

logger = logging.getLogger(__name__)

#: gains below the budget and above, and bounds of a single change and of the whole factor: found on
#: the toy of the tests, where 20 measurements with a noise of a fifth of the budget end at it, from
#: a fifth and from ten times
GAIN, GAIN_ABOVE = 0.5, 1.0
CHANGE = (0.5, 2.0)
FACTOR = (1 / 64, 8.0)


class LossBudget:
    """A factor for the strength that keeps the held-out loss at a share above plain fine-tuning's.

    It steers towards the budget, faster from above than from below, and needs some twenty
    measurements of the same held-out text over a training for that; noise of the held-out loss
    should be well below the budget. What is over the budget although next to nothing is left of the
    strength is not the term's doing, and is said once.

    Args:
        budget: share by which the held-out loss may lie above the reference, > 0.
        reference: global step to held-out loss in nats of a run without the term, otherwise the
            same. Linear between two steps, constant before the first and after the last.
        start: global step from which on the term has its whole strength. Until it is over the
            factor stays 1, whatever is measured.

    Attributes:
        factor: what the strength is multiplied by, within ``FACTOR``.
        spent: share of the budget that the last measurement found spent; None before the first.

    Raises:
        InvalidInputError: a budget outside its range; a reference without losses, or with steps or
            losses that are none.
    """

    def __init__(self, budget: float, reference: Mapping[int, float], start: int = 0) -> None:
        check_budget(budget, reference)
        self.budget = budget
        self._steps = sorted(reference)
        self._losses = [reference[step] for step in self._steps]
        self._start = start
        self.factor = 1.0
        self.spent: float | None = None
        self._said = False

    def reference_at(self, step: int) -> float:
        """Loss of plain fine-tuning at a global step, nats."""
        return float(np.interp(step, self._steps, self._losses))

    def update(self, step: int, loss: float) -> None:
        """Take in a measurement; one that is not finite says nothing and changes nothing.

        Args:
            step: global step, optimiser steps done so far.
            loss: held-out loss there, nats, measured as the reference's was.
        """
        if not math.isfinite(loss):
            return
        spent = (loss / self.reference_at(step) - 1) / self.budget
        if step > self._start:
            before = self.spent or 0.0  # both runs begin with the same weights
            expected = spent + (spent - before)
            gain = GAIN if expected < 1 else GAIN_ABOVE
            self.factor *= _within(CHANGE, math.exp(min(1.0, gain * (1 - expected))))
            self.factor = _within(FACTOR, self.factor)
            if self.factor == FACTOR[0] and min(spent, before) > 1 and not self._said:
                self._said = True
                logger.warning(
                    "budget: at step %d the held-out loss lies %s above the reference, where "
                    "%s are allowed, although the strength fell to 1/%d of what was set. So "
                    "it is not the term that costs it: make the reference with the same data, "
                    "held-out text, batches and learning rate, at strength 0, or set no budget",
                    step, percent(spent * self.budget, 1), percent(self.budget, 1),
                    round(1 / FACTOR[0]),
                )  # fmt: skip
        self.spent = spent

    def state(self) -> dict[str, float | None]:
        """What a resumed training starts from."""
        return {"factor": self.factor, "spent": self.spent}

    def load(self, kept: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state`."""
        self.factor, self.spent = kept["factor"], kept["spent"]


def check_budget(budget: float | None, reference: Any, monitor: Any = None) -> None:
    """Refuse a budget without a reference, the other way round, and what is neither.

    Args:
        budget: as of :class:`LossBudget`, or None.
        reference: as there, a path, or None.
        monitor: name of the held-out loss, or None.

    Raises:
        InvalidInputError: what is wrong, and how to make a reference.
    """
    if monitor is not None and not isinstance(monitor, str):
        raise InvalidInputError(f"monitor: found {monitor!r}, allowed are names, None")
    if budget is None and reference is None:
        return
    if budget is None:
        raise InvalidInputError(
            "reference: found one without a budget; set budget too (0.01: the held-out loss may "
            "lie 1 % above the reference), or leave the reference out"
        )
    check_range("budget", budget, 0, float("inf"), open_low=True, open_high=True)
    if isinstance(reference, str | Path):
        return
    how = (
        "run once with strength 0 on the same data and held-out text, validating as often, and "
        "give the folder of that run, or its held-out losses as {step: nats}"
    )
    if reference is None:
        raise InvalidInputError(
            "budget: found no reference, the held-out losses of plain fine-tuning that the budget "
            f"is counted from; {how}"
        )
    if not isinstance(reference, Mapping) or not reference:
        raise InvalidInputError(f"reference: found {reference!r}, allowed are losses; {how}")
    for step, loss in reference.items():
        check_least("reference, a step", step, 0)
        name = f"reference, the loss at step {step}"
        check_range(name, loss, 0, float("inf"), open_low=True, open_high=True)


def _within(bounds: tuple[float, float], value: float) -> float:
    low, high = bounds
    return min(high, max(low, value))
