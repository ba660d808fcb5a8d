"""Bounds of colours follow what was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from softtrace.report.colour_scale import ENDS, SHADES, shade_bounds


def test_bounds_are_even_on_a_log_axis_between_the_stated_quantiles() -> None:
    values = np.geomspace(1e-4, 1, 1001)
    bounds = shade_bounds(values)
    assert len(bounds) == SHADES - 1
    low, high = np.quantile(values, ENDS)
    assert [bounds[0], bounds[-1]] == pytest.approx([low, high], rel=0.05)  # two digits
    steps = np.diff(np.log(bounds))
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.1)


def test_a_model_that_needs_much_is_told_apart_by_all_shades() -> None:
    """Sizes of SmolLM2-135M: 9 % to 64 %, all over the 10 % that fixed bounds ended with."""
    sizes = 0.088 + 0.552 * np.random.default_rng(0).beta(2, 2, 200)
    shades = np.searchsorted(shade_bounds(sizes), sizes)
    assert set(shades) == set(range(SHADES))
    assert np.bincount(shades).max() < len(sizes) / 2


def test_bounds_are_exactly_what_two_digits_say() -> None:
    bounds = shade_bounds(np.random.default_rng(1).uniform(1e-5, 1, 50))
    assert bounds == [float(f"{bound:.2g}") for bound in bounds]


def test_what_has_no_logarithm_is_left_out() -> None:
    values = [0.1, 0.2, 0.4]
    assert shade_bounds([*values, None, 0.0, math.nan]) == shade_bounds(values)


@pytest.mark.parametrize(
    ("values", "count"), [([], 0), ([None, 0.0], 0), ([0.3], 1), ([0.300, 0.305, 0.31], 2)]
)
def test_values_close_together_have_fewer_bounds(values: list[float | None], count: int) -> None:
    bounds = shade_bounds(values)
    assert len(bounds) == count
    assert bounds == sorted(set(bounds))
