"""Checks of numbers and paths that users hand in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from softtrace.checks import as_integer, check_choice, check_least, check_range
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


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), torch.tensor([3])])
def test_integers_of_all_kinds(value: Any) -> None:
    found = as_integer(value)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", None,
     torch.tensor([1, 2]), np.array([True])],
)  # fmt: skip
def test_what_is_no_integer(value: Any) -> None:
    assert as_integer(value) is None


def test_a_setting_is_an_int_of_python() -> None:
    check_least("x", 3, 3)
    check_least("x", None, 3, optional=True)
    for wrong in (2, 3.0, True, None, "3", np.int64(2)):
        with pytest.raises(InvalidInputError, match=r"x: found .*, allowed are integers from 3$"):
            check_least("x", wrong, 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"integers from 3, None; pass int\(x\)$"):
        check_least("x", np.int64(3), 3, optional=True)  # type: ignore[arg-type]


def test_words_that_are_not_allowed_are_refused_with_those_that_are() -> None:
    check_choice("x", "one", ("one", "other"))
    with pytest.raises(InvalidInputError, match=r"^x: found 'third', allowed are 'one', 'other'$"):
        check_choice("x", "third", ("one", "other"))
