"""The colours of the page's maps: bounds between shades that follow what was measured."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SHADES = 7
"""Number of shades that ``report.css`` has."""

ENDS = (0.1, 0.9)
"""Quantiles of the values at which the first shade ends and the last one begins."""


def shade_bounds(values: Iterable[float | None]) -> list[float]:
    """At most ``SHADES - 1`` rising bounds, evenly spaced on a log axis between two quantiles.

    Runs that are compared share one scale: give the values of all of them at once. Bounds have two
    significant digits, so that a legend says them exactly; values closer together than that share
    bounds, and there are fewer of them.

    Args:
        values: shares of 1. Those that are missing, or 0 (a log axis has none), are left out.

    Returns:
        An empty list where nothing is left.
    """
    found = np.asarray([value for value in values if value], dtype=np.float64)
    found = found[found > 0]  # also without NaN
    if not len(found):
        return []
    low, high = np.quantile(found, ENDS)
    bounds = np.geomspace(low, high, SHADES - 1)
    return sorted({float(f"{bound:.2g}") for bound in bounds})
