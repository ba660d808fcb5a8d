"""When a run with the density term does not move, and what to turn: a function of measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from softtrace.loss.budget import FACTOR
from softtrace.loss.options import DensityOptions
from softtrace.percent import percent

LEAST_FALL = 0.05  # of the area of easy tokens, as a share of itself
LEAST_RISE = 0.02  # of the share of easy tokens on which exits agree
SELDOM = 4  # masked runs further apart than this are the first thing to change
SPENT = 0.8  # share of a budget beyond which it is what holds the strength where it is


def standstill(
    history: Sequence[dict[str, float]],
    options: DensityOptions,
    patience: int,
    factor: float = 1.0,
) -> str | None:
    """What to tell the user of a run whose densities stand still; None where there is nothing.

    The last measurement is compared with the first at which the term had its whole strength. Both
    are of the same rows, so that small changes count. With a budget nothing is said once most of it
    is spent, for then it is the budget that keeps the strength low, nor where that is not known.

    Args:
        history: measurements in order: ``step``, ``area_easy`` and ``exit_agreement_easy`` (both
            shares) of each, and with a budget ``loss_over_reference``, the share by which the
            held-out loss lies above the reference's. Where steps do not rise another fit began;
            only the last one counts.
        options: of the penalty, as they are on the device (:meth:`DensityOptions.on`).
        patience: optimiser steps that have to lie between the two, >= 1.
        factor: by which a budget multiplies the strength now.
    """
    if options.strength == 0 or not history:
        return None
    last = history[-1]
    over = last.get("loss_over_reference", math.nan)
    # Here and below written so that NaN says nothing.
    if options.budget is not None and not over < SPENT * options.budget:
        return None
    first = last
    for each in reversed(history[:-1]):
        if not options.start_step + options.warmup_steps <= each["step"] < first["step"]:
            break
        first = each
    if last["step"] - first["step"] < patience:
        return None
    area, was_area = last["area_easy"], first["area_easy"]
    exits, had_exits = last["exit_agreement_easy"], first["exit_agreement_easy"]
    if not area > (1 - LEAST_FALL) * was_area:
        return None
    found = f"the area of easy tokens went from {was_area:.4f} to {area:.4f}"
    wanted = f"a fall by {percent(LEAST_FALL, 0)} of itself"
    if options.exits > 0:
        if not exits - had_exits < LEAST_RISE:
            return None
        found += (
            f", and the share of easy tokens on which exits at half depth agree from "
            f"{percent(had_exits, 1)} to {percent(exits, 1)}"
        )
        wanted += f" or a rise by {100 * LEAST_RISE:.0f} points"
    dial, left = f"double strength (it is {options.strength:g})", ""
    if options.budget is not None:
        spent, allowed = (percent(each, 2, signed=True) for each in (over, options.budget))
        left = (
            f"The budget is not spent (held-out loss {spent} against the reference, where "
            f"{allowed} is allowed). "
        )
        dial = f"double strength (it is {options.strength:g}, times {factor:.3g} by the budget)"
        if factor < FACTOR[1]:
            dial += " or validate more often (a budget raises it at validations only)"
    if (every := options.schedule.every) > SELDOM:
        dial = (
            f"lower every first (masked runs come only once in {every} steps) or raise share (it "
            f"is {options.window_share:g}); if that does not help, {dial}"
        )
    return (
        f"The density penalty moves nothing any more: from step {first['step']} to step "
        f"{last['step']} {found}; less than {wanted}. {left}To change that, {dial}. "
        "DensityMonitor(patience=None) never says this."
    )
