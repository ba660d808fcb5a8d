"""Shares as people read them: one way to write per cent, with a space before the sign."""

from __future__ import annotations


def percent(share: float, decimals: int | None = None, *, signed: bool = False) -> str:
    """A share of 1 as per cent.

    Args:
        share: what is written.
        decimals: None gives smaller shares more of them.
        signed: whether a plus stands before what is not negative, as before changes.
    """
    value = 100 * share
    if decimals is None:
        size = abs(value)
        decimals = 1 if size >= 10 or size == 0 else 2 if size >= 0.1 else 4
    return f"{value:{'+' if signed else ''}.{decimals}f} %"


def brief_percent(share: float) -> str:
    """A share of 1 as per cent, with as many decimals as it has: of numbers that someone chose."""
    return f"{100 * share:g} %"
