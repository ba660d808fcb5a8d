"""Strength over training, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from softtrace.errors import InvalidInputError
from softtrace.loss.schedule import StrengthSchedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (StrengthSchedule(0.5), [0.5, 0.5, 0.5, 0.5]),
        (StrengthSchedule(0.0), [0, 0, 0, 0]),
        (StrengthSchedule(2.0, start_step=2), [0, 0, 2, 2, 2]),
        (StrengthSchedule(1.0, warmup_steps=3), [0.25, 0.5, 0.75, 1, 1]),
        (StrengthSchedule(3.0, start_step=1, warmup_steps=2), [0, 1, 2, 3, 3]),
        (StrengthSchedule(0.5, every=3), [1.5, 0, 0, 1.5, 0, 0, 1.5]),
        (StrengthSchedule(1.0, start_step=1, warmup_steps=3, every=2), [0, 0.5, 0, 1.5, 0, 2, 0]),
    ],
)
def test_table(schedule: StrengthSchedule, expected: list[float]) -> None:
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected)
    late = [schedule(step) for step in range(10**9, 10**9 + schedule.every)]
    assert sorted(late) == [*[0] * (schedule.every - 1), schedule.every * schedule.strength]
    backwards = [schedule(step) for step in reversed(range(len(expected)))]  # it keeps no state
    assert backwards == pytest.approx(expected[::-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -0.1}, r"strength: found -0.1, allowed \[0, inf\)"),
        ({"strength": float("inf")}, "strength: found inf"),
        ({"strength": float("nan")}, "strength: found nan"),
        ({"strength": True}, "strength: found True"),
        ({"strength": 1.0, "start_step": -1}, "start_step: found -1, allowed are integers from 0"),
        ({"strength": 1.0, "start_step": 1.5}, "start_step: found 1.5"),
        ({"strength": 1.0, "warmup_steps": -3}, "warmup_steps: found -3"),
        ({"strength": 1.0, "warmup_steps": True}, "warmup_steps: found True"),
        ({"strength": 1.0, "every": 0}, "every: found 0, allowed are integers from 1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        StrengthSchedule(**arguments)
