"""Checks of numbers and paths that users hand in."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection

from softtrace.errors import InvalidInputError, SofttraceError


def as_integer(value: object) -> int | None:
    """``value`` as an int where it is an integer, of numpy or torch too; None for all else.

    Neither bools, which are meant as masks or flags, nor floats of a whole number are integers.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_least(name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    """Raise :class:`InvalidInputError` for what is no int, below ``least`` or, else, None.

    What is checked here is kept and written to files, which take no integers of numpy or torch.
    """
    if value is None and optional:
        return
    number = as_integer(value)
    if number is None or number < least or not isinstance(value, int):
        allowed = f"integers from {least}" + (", None" if optional else "")
        convert = "" if number is None or number < least else f"; pass int({name})"
        raise InvalidInputError(f"{name}: found {value!r}, allowed are {allowed}{convert}")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` if it lies in the range, else raise :class:`InvalidInputError`."""
    number = (
        isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    )
    above = number and (value > low if open_low else value >= low)
    below = number and (value < high if open_high else value <= high)
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise InvalidInputError(f"{name}: found {value!r}, allowed {left}{low:g}, {high:g}{right}")
    return value


def check_counts(least: int, **counts: int) -> None:
    """:func:`check_least` of several numbers that have the same bound, each under its own name."""
    for name, value in counts.items():
        check_least(name, value, least)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise :class:`InvalidInputError` for what is none of the allowed words."""
    if value not in allowed:
        raise InvalidInputError(
            f"{name}: found {value!r}, allowed are {', '.join(map(repr, allowed))}"
        )


def refuse_empty(
    name: str,
    path: str | os.PathLike[str],
    expected: str,
    error: type[SofttraceError] = InvalidInputError,
) -> None:
    """Raise ``error`` for an empty path, which would be taken for the working directory."""
    if not os.fspath(path):
        raise error(
            f"{name}: found an empty path, expected {expected}; is a variable of the shell unset?"
        )
