"""Whether measured curves have the paper's two phases; plots and page shade them only then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softtrace.density.curve import PHASES
from softtrace.evaluation.density_file import Density
from softtrace.percent import brief_percent, percent

CONSTRUCTION_SHARE = 0.25
"""The least share of the fall of TV at which there is a construction phase.

A convention: half of what a curve has that falls evenly over the logarithm of size from 0.01 % to
100 % of the edges. SmolLM2-135M has 0.02 at 64 tokens, the shipped model 0.66.
"""

Curve = tuple[Sequence[float], Sequence[float | None]]
"""Sizes of traces, rising, and the mean TV at each; None where nothing was measured."""


def curves_of(densities: Sequence[Density]) -> list[Curve]:
    """The curve of all tokens of each ``density.json``: what decides on phases."""
    return [(density["curve"]["sizes"], density["curve"]["all"]["mean"]) for density in densities]


def construction_share(curve: Curve) -> float | None:
    """Which share of the fall of TV comes at sizes of the construction phase, up to 1 % of edges.

    The fall is from the smallest measured size to the full graph, where TV is 0; TV at 1 % is read
    off over log size. Negative where TV is higher there than at the smallest size. None where the
    curve has a gap, or nothing to fall.
    """
    sizes = np.log10(np.asarray(curve[0], dtype=np.float64))
    variation = np.asarray(curve[1], dtype=np.float64)
    end = np.interp(np.log10(PHASES["construction"][1]), sizes, variation)
    start = variation[0]
    if not start > 0 or np.isnan(end):
        return None
    return float((start - end) / start)


def shown_phases(curves: Sequence[Curve]) -> dict[str, tuple[float, float]]:
    """Where to shade phases behind these curves: the paper's :data:`PHASES`, or nowhere.

    They are shaded if every curve has at least :data:`CONSTRUCTION_SHARE` of its fall of TV at
    sizes of the construction phase (:func:`construction_share`). A curve without that has no
    construction phase, so what follows refines nothing either.
    """
    shares = [construction_share(curve) for curve in curves]
    have = all(share is not None and share >= CONSTRUCTION_SHARE for share in shares)
    return dict(PHASES) if have else {}


def phases_note(curves: Sequence[Curve]) -> str:
    """The shares that :func:`shown_phases` decides by, in words; of several curves the range."""
    found = [share for curve in curves if (share := construction_share(curve)) is not None]
    if not found:
        return "where TV falls could not be measured"
    ends = [percent(share, 0) for share in (min(found), max(found))]
    shares = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    end = brief_percent(PHASES["construction"][1])
    return f"{shares} of the fall of TV comes below {end} of the edges"
