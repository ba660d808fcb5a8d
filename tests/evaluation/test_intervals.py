"""Intervals of what is measured: against the summary's own numbers, and in units of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace.evaluation import intervals as intervals_module
from softtrace.evaluation.bootstrap import Interval, Statistic, intervals
from softtrace.evaluation.intervals import intervals_of
from softtrace.evaluation.measure import Measurements
from softtrace.evaluation.summary import summarise
from softtrace.report.tables import MEASURES, interval

TOKENS, LAYERS = 5, 4


def made_up(blocks: int) -> Measurements:
    """Random numbers, in parts of three blocks."""
    generator = torch.Generator().manual_seed(0)

    def parts(*shape: int) -> list[torch.Tensor]:
        whole = torch.rand(*shape, blocks * TOKENS, generator=generator)
        return list(whole.split(3 * TOKENS, dim=-1))

    return Measurements(
        entropy=parts(), loss=parts(), area=parts(), size=parts(), variation=parts(26),
        agreement=[part > 0.5 for part in parts(LAYERS)],
    )  # fmt: skip


@pytest.mark.parametrize("most", [7, 2048])  # 10 blocks are 5 units of two, or 10; 11 are padded
@pytest.mark.parametrize("blocks", [10, 11])
def test_they_are_intervals_of_the_very_numbers(
    monkeypatch: pytest.MonkeyPatch, blocks: int, most: int
) -> None:
    seen: dict[str, Interval] = {}
    units: set[int] = set()

    def spy(statistics: dict[str, Statistic], resamples: int, seed: int) -> dict[str, Interval]:
        units.update(statistic.sequences for statistic in statistics.values())
        seen.update(intervals(statistics, resamples, seed))
        return seen

    monkeypatch.setattr(intervals_module, "intervals", spy)
    monkeypatch.setattr(intervals_module, "_MOST", most)
    found = made_up(blocks)
    bounds = intervals_of(found, blocks)
    summary: Any = summarise(found)
    assert set(bounds) == {m.key for m in MEASURES if m.unit != "correlation"}
    for measure in MEASURES:
        if measure.key in bounds:
            value = measure.read(summary)
            assert float(seen[measure.key].value) == pytest.approx(value, abs=1e-6)
            low, high = bounds[measure.key]
            assert low < high
    assert units == {blocks if most > blocks else (blocks + 1) // 2}


def test_a_single_block_has_none() -> None:
    assert intervals_of(made_up(1), 1) == {}
    assert len(intervals_of(made_up(2), 2)) == len(MEASURES) - 1


def test_an_interval_has_two_ends() -> None:
    held: Any = {"a": [1.0, 2.0], "b": [None, 2.0], "c": [1.0, float("nan")]}
    assert [interval({"intervals": held}, key) for key in "abcd"] == [(1.0, 2.0), None, None, None]
    assert interval({}, "a") is None
