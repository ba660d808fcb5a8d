"""Checks of numbers and paths that users hand in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from softtrace.checks import check_range
from softtrace.errors import InvalidInputError


@pytest.mark.parametrize("value", [0, 1, 0.5, 0.0, 1.0])
def test_numbers_in_a_closed_range_come_back(value: float) -> None:
    assert check_range("x", value, 0, 1) == value


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (-0.1, {}, r"x: found -0.1, allowed \[0, 1\]"),
        (1.1, {}, r"allowed \[0, 1\]"),
        (0, {"open_low": True}, r"x: found 0, allowed \(0, 1\]"),
        (1, {"open_high": True}, r"x: found 1, allowed \[0, 1\)"),
        (math.nan, {}, "found nan"),
        (True, {}, "found True"),
        ("0.5", {}, "found '0.5'"),
        (None, {}, "found None"),
    ],
)
def test_numbers_outside_a_range_are_refused(value: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_range("x", value, 0, 1, **options)
