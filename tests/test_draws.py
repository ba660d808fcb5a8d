"""Draws are a pure, stratified function of (seed, step, rank)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softtrace.draws import Draw, draw

ROWS = torch.tensor([0, 2, 3, 5, 7, 8, 11, 12])
# rows, start, thresholds, depths
PINNED: tuple[Any, ...] = (
    [11, 5, 0, 8],
    8,
    [0.1327715, 0.0609237, 0.0152223, 0.417927],
    [3, 5, 2, 4],
)


def one(**changes: Any) -> Draw:
    arguments: dict[str, Any] = {
        "seed": 0, "step": (0, 0), "rank": 0, "rows": ROWS, "share": 1.0, "room": 9,
        "thresholds": (0.01, 0.5), "depths": (2, 5),
    }  # fmt: skip
    return draw(**{**arguments, **changes})


def key(found: Draw) -> tuple[Any, ...]:
    return (
        tuple(found.rows.tolist()),
        found.start,
        tuple(found.thresholds.tolist()),
        tuple(found.depths.tolist()),
    )


def test_draws_depend_on_seed_step_and_rank_alone() -> None:
    state = torch.get_rng_state()
    seen = set()
    for changes in (
        {}, {"seed": 1}, {"seed": -1}, {"step": (1, 0)}, {"step": (0, 1)}, {"rank": 1},
        {"step": (11, 0)}, {"step": (1, 1)}, {"step": (1, 10)}, {"step": (10**9, 0)},
    ):  # fmt: skip
        first = key(one(**changes))
        torch.manual_seed(len(seen))
        torch.rand(3)
        assert key(one(**changes)) == first
        seen.add(first)
    assert len(seen) == 10
    torch.set_rng_state(state)
    one()
    assert torch.equal(torch.get_rng_state(), state)  # nor do they move the global state


def test_draws_do_not_change_between_versions() -> None:
    """A resumed run has to go on with the draws of the run it resumes."""
    found = one(share=0.5, seed=3, step=(7, 1), rank=2)
    assert found.rows.tolist() == PINNED[0]
    assert found.start == PINNED[1]
    assert found.thresholds.tolist() == pytest.approx(PINNED[2], rel=1e-5)
    assert found.depths.tolist() == PINNED[3]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(), step=st.integers(0, 10**6), count=st.integers(1, 9))
def test_thresholds_and_depths_are_stratified(seed: int, step: int, count: int) -> None:
    rows = torch.arange(count)
    found = one(seed=seed, step=(step, 0), rows=rows, depths=(1, count))
    assert sorted(found.rows.tolist()) == rows.tolist()
    assert 0 <= found.start <= 9
    low, high = math.log(0.01), math.log(0.5)
    levels = [(math.log(tau) - low) / (high - low) * count for tau in found.thresholds.tolist()]
    for stratum, level in enumerate(sorted(levels)):  # one in each of `count` equal parts
        assert stratum - 1e-4 <= level <= stratum + 1 + 1e-4
    assert sorted(found.depths.tolist()) == list(range(1, count + 1))


def test_shares_round_to_rows_and_take_at_least_one() -> None:
    counts = {1e-9: 1, 0.1: 1, 0.25: 2, 0.5: 4, 0.8: 6, 1.0: 8}
    for share, count in counts.items():
        found = one(share=share)
        assert len(found.rows) == len(found.thresholds) == len(found.depths) == count
        assert set(found.rows.tolist()) <= set(ROWS.tolist())
        assert len(set(found.rows.tolist())) == count
    assert one(rows=torch.tensor([4]), share=0.1).rows.tolist() == [4]


def test_over_many_steps_everything_is_drawn_evenly() -> None:
    rows, starts, depths, levels = [], [], [], []
    for step in range(400):
        found = one(step=(step, 0), share=0.25)
        rows += found.rows.tolist()
        starts.append(found.start)
        depths += found.depths.tolist()
        levels += found.thresholds.log().tolist()
    for values, kinds in ((rows, ROWS.tolist()), (starts, range(10)), (depths, range(2, 6))):
        expected = len(values) / len(kinds)
        assert set(values) == set(kinds)
        for kind in kinds:
            assert abs(values.count(kind) - expected) < 5 * math.sqrt(expected)
    middle = (math.log(0.01) + math.log(0.5)) / 2
    assert sum(levels) / len(levels) == pytest.approx(middle, abs=0.1)
    assert math.log(0.01) <= min(levels) < math.log(0.0102)
    assert math.log(0.49) < max(levels) <= math.log(0.5) + 1e-6


def test_degenerate_bounds() -> None:
    found = one(thresholds=(0.2, 0.2), depths=(3, 3), room=0)
    assert found.thresholds.tolist() == pytest.approx([0.2] * 8)
    assert found.depths.tolist() == [3] * 8
    assert found.start == 0
    assert found.rows.dtype == found.depths.dtype == torch.int64
    assert found.thresholds.dtype == torch.float32
