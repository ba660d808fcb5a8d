"""Phases are shaded where the measured curve has them, or not at all."""

from __future__ import annotations

import pytest

from softtrace.density.curve import PHASES
from softtrace.report.phases import (
    CONSTRUCTION_SHARE,
    Curve,
    construction_share,
    curves_of,
    phases_note,
    shown_phases,
)
from tests.support.densities import SIZES, synthetic_density

REAL = [
    0.954, 0.952, 0.949, 0.947, 0.95, 0.948, 0.946, 0.945, 0.943, 0.943, 0.946, 0.947, 0.938,
    0.926, 0.916, 0.903, 0.871, 0.826, 0.737, 0.562, 0.407, 0.32, 0.24, 0.16, 0.08, 0.0,
]  # fmt: skip
"""Mean TV of SmolLM2-135M: nothing happens below 1 % of the edges."""


def bent(at_one_per_cent: float, start: float = 0.8) -> Curve:
    """A curve that has this TV at 1 % of the edges."""
    return [1e-4, 1e-2, 1.0], [start, at_one_per_cent, 0.0]


@pytest.mark.parametrize(
    ("curve", "share"),
    [
        (bent(0.2), 0.75),
        (bent(0.8), 0.0),
        (bent(0.88), -0.1),
        ((SIZES, [1 - step / 25 for step in range(26)]), 0.5),  # 1 % lies between two sizes
        (([1e-4, 1.0], [0.4, 0.0]), 0.5),
        ((SIZES, REAL), 0.023),
    ],
)
def test_share_of_the_fall_below_one_per_cent(curve: Curve, share: float) -> None:
    assert construction_share(curve) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("start", [0.9, 0.3])
def test_phases_begin_at_the_share_that_is_stated(start: float) -> None:
    just, under = (start * (1 - CONSTRUCTION_SHARE - step) for step in (1e-9, -0.001))
    assert shown_phases([bent(just, start)]) == PHASES
    assert shown_phases([bent(under, start)]) == {}


def test_a_curve_without_construction_has_no_phase_at_all() -> None:
    assert shown_phases([(SIZES, REAL)]) == {}
    assert phases_note([(SIZES, REAL)]) == "2 % of the fall of TV comes below 1 % of the edges"


def test_curves_in_one_figure_all_need_the_phases() -> None:
    runs = [bent(0.2), (SIZES, REAL)]
    assert shown_phases(runs[:1]) == PHASES
    assert shown_phases(runs) == shown_phases(runs[::-1]) == {}
    assert phases_note(runs).startswith("2 % to 75 % of the fall")


@pytest.mark.parametrize("values", [[None, None, None], [0.8, None, 0.0], [0.0, 0.0, 0.0]])
def test_what_could_not_be_measured_has_no_phases(values: list[float | None]) -> None:
    curve = ([1e-4, 1e-2, 1.0], values)
    assert construction_share(curve) is None
    assert shown_phases([curve]) == {}
    assert "could not be measured" in phases_note([curve])


def test_all_tokens_of_a_run_decide() -> None:
    density = synthetic_density()
    density["curve"]["all"] = {"mean": REAL}
    assert curves_of([density]) == [(SIZES, REAL)]
