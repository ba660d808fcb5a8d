"""Every way to measure is the curve of that way, and a conclusion holds where its interval says."""

from __future__ import annotations

import pytest
import torch

import softtrace
from softtrace.density.sweep import curve_of
from softtrace.evaluation.study.readings import STUDY_SIZES
from softtrace.evaluation.study.sensitivity import (
    DEFINITIONS,
    Definition,
    Reading,
    conclusions,
    grid_of,
    read_definitions,
    ways,
)
from tests.support.tiny import tiny_model, tiny_prompt

BLOCKS = tiny_prompt(8, seed=3, batch=3)
SOME = (
    Definition(),
    Definition(thresholds="26"),
    Definition(attention="recorded", norm="l2"),
    Definition(attention="kept", stand_in="mean"),
    Definition(attention="recorded", norm="ifr", stand_in="mean", thresholds="90"),
)


@pytest.fixture(scope="module")
def found() -> dict[Definition, Reading]:
    return read_definitions(
        tiny_model("llama"), BLOCKS, first=4, batch_size=2, progress=lambda count: None,
        definitions=SOME,
    )  # fmt: skip


@pytest.mark.parametrize("definition", SOME, ids=str)
def test_a_reading_is_that_of_the_curve(
    found: dict[Definition, Reading], definition: Definition
) -> None:
    model = tiny_model("llama")
    instrument = softtrace.attach(model)
    batch = instrument.batch(BLOCKS)
    means = instrument.means_of([batch]) if definition.stand_in == "mean" else None
    with torch.no_grad():
        recording = instrument.record(batch, norm=definition.norm)
        curve = curve_of(
            instrument, recording, recording.importance, grid_of(definition.thresholds),
            attention=definition.attention, means=means,
        )  # fmt: skip
    reading = found[definition]
    torch.testing.assert_close(reading.area, curve.area()[:, 4:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(reading.size, curve.size_at()[:, 4:-1], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(reading.entropy, curve.entropy[:, 4:-1])
    summed = curve.at_sizes(STUDY_SIZES)[:, :, 4:-1].sum(2).T
    torch.testing.assert_close(reading.variation, summed, atol=1e-5, rtol=0)


def test_all_ways_are_told_apart() -> None:
    assert len(set(DEFINITIONS)) == 54
    assert ways() == 18
    assert [len(grid_of(name)) for name in ("11", "26", "90")] == [11, 26, 90]
    assert set(grid_of("26")) < set(grid_of("90"))


def reading(area: torch.Tensor, construction: float) -> Reading:
    """Areas as given, rising with entropy; so much of the fall of TV below 1 % of the edges."""
    variation = torch.linspace(1, 0, 25).repeat(len(area), 1)
    variation[:, 12] = 1 - construction
    return Reading(variation, area, area, area * 2)


def test_a_conclusion_holds_where_the_interval_lies_on_one_side() -> None:
    area = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    way = Definition()
    before, after = {way: reading(area + 0.5, 0.9)}, {way: reading(area, 0.1)}
    (row,) = conclusions([before, after], resamples=50, seed=0)
    assert row["holds"] == {"two_phases": "no", "entropy": "yes", "order": "yes"}
    assert row["order"]["value"] == pytest.approx(0.5)
    (row,) = conclusions([after, before], resamples=50, seed=0)
    assert row["holds"] == {"two_phases": "yes", "entropy": "yes", "order": "no"}
    (row,) = conclusions([before, before], resamples=50, seed=0)
    assert row["holds"]["order"] == "open"  # of two that are equal neither is above the other
    (row,) = conclusions([before], resamples=50, seed=0)
    assert "order" not in row
    noise = torch.rand(20, 6, generator=torch.Generator().manual_seed(1))
    (row,) = conclusions([{way: Reading(before[way].variation, area, area, noise)}], 50, 0)
    assert row["holds"]["entropy"] == "open"
