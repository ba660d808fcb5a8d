"""Draws are a pure, stratified function of (seed, step, rank)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace import DensityLoss
from softtrace.loss.draws import Draw, draw
from tests.support.tiny import tiny_model, tiny_prompt

ROWS = [0, 2, 3, 5, 7, 8, 11, 12]
LENGTH = 12
# rows, starts, thresholds, depths
PINNED: tuple[Any, ...] = (
    [0, 2, 11, 5, 5],
    [5, 0, 5, 5, 0],
    [0.1186598, 0.0493631, 0.4860239, 0.0296216, 0.0102237],
    [2, 2, 5, 4, 5],
)


def counted(rows: Iterable[int] = ROWS, places: Sequence[int] = range(LENGTH)) -> Tensor:
    """[13, 12]: tokens that take part."""
    found = torch.zeros(13, LENGTH, dtype=torch.bool)
    for row in rows:
        found[row, list(places)] = True
    return found


def one(**changes: Any) -> Draw:
    arguments: dict[str, Any] = {
        "seed": 0, "step": (0, 0), "rank": 0, "counted": counted(), "share": 1.0, "window": 5,
        "thresholds": (0.01, 0.5), "depths": (2, 5),
    }  # fmt: skip
    found = draw(**{**arguments, **changes})
    assert found is not None
    return found


def key(found: Draw) -> tuple[Any, ...]:
    parts = (found.rows, found.starts, found.thresholds, found.depths)
    return tuple(tuple(part.flatten().tolist()) for part in parts)


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
    """A resumed run has to continue the draws of the run it resumes."""
    found = one(share=0.3, seed=3, step=(7, 1), rank=2)
    assert found.rows.tolist() == PINNED[0]
    assert found.starts.tolist() == PINNED[1]
    assert found.thresholds.tolist() == pytest.approx(PINNED[2], rel=1e-5)
    assert found.depths[:, 0].tolist() == PINNED[3]


@settings(max_examples=50)
@given(seed=st.integers(), step=st.integers(0, 10**6), count=st.integers(1, 9))
def test_thresholds_and_depths_are_stratified(seed: int, step: int, count: int) -> None:
    found = one(
        seed=seed, step=(step, 0), counted=counted(range(count)), depths=(1, count), window=LENGTH
    )
    assert sorted(found.rows.tolist()) == list(range(count))
    low, high = math.log(0.01), math.log(0.5)
    levels = [(math.log(tau) - low) / (high - low) * count for tau in found.thresholds.tolist()]
    for stratum, level in enumerate(sorted(levels)):  # one in each of `count` equal parts
        assert stratum - 1e-4 <= level <= stratum + 1 + 1e-4
    assert sorted(found.depths.flatten().tolist()) == sorted(list(range(1, count + 1)) * LENGTH)


def test_shares_round_to_windows_and_take_at_least_one() -> None:
    counts = {1e-9: 1, 0.1: 2, 0.25: 4, 0.5: 8, 0.8: 13, 1.0: 16}  # two windows of 5 fit into 12
    for share, count in counts.items():
        found = one(share=share)
        windows = list(zip(found.rows.tolist(), found.starts.tolist(), strict=True))
        assert len(windows) == len(found.thresholds) == len(found.depths) == count
        assert {row for row, _ in windows} <= set(ROWS)
        assert len(set(windows)) == count
    assert one(counted=counted([4]), share=0.1).rows.tolist() == [4]


@given(
    window=st.integers(1, LENGTH),
    seed=st.integers(),
    places=st.lists(st.integers(0, LENGTH - 1), min_size=1),
)
def test_windows_are_apart_and_none_is_without_counted_tokens(
    window: int, seed: int, places: list[int]
) -> None:
    tokens = counted(places=places)
    found = draw(
        seed=seed, step=(0, 0), rank=0, counted=tokens, share=1.0, window=window,
        thresholds=(0.1, 0.2), depths=(1, 2),
    )  # fmt: skip
    slots = LENGTH // window
    if found is None:  # all counted tokens are in the remainder
        assert slots * window < LENGTH
        return
    starts = found.starts[found.rows == ROWS[0]].tolist()
    assert len(starts) == len(set(starts)) <= slots
    assert len({start % window for start in starts}) == 1
    assert max(starts) + window <= LENGTH
    assert found.of(tokens, window).any(-1).all()
    outside = tokens.clone()
    for row, start in zip(found.rows.tolist(), found.starts.tolist(), strict=True):
        outside[row, start : start + window] = False
    assert outside[ROWS[0]].sum() <= LENGTH - slots * window  # the others hold every counted token


def test_over_many_steps_everything_is_drawn_evenly() -> None:
    rows, starts, depths, levels = [], [], [], []
    for step in range(400):
        found = one(step=(step, 0), share=0.25)
        rows += found.rows.tolist()
        starts += found.starts.tolist()
        depths += found.depths.flatten().tolist()
        levels += found.thresholds.log().tolist()
    kinds = (0, 1, 2, 5, 6, 7)  # offsets 0 to 2
    for values, expected_of in ((rows, ROWS), (starts, kinds), (depths, range(2, 6))):
        expected = len(values) / len(expected_of)
        assert set(values) == set(expected_of)
        for kind in expected_of:
            # All windows of a step share their offset, four of them: hence the doubled deviation.
            assert abs(values.count(kind) - expected) < 10 * math.sqrt(expected)
    middle = (math.log(0.01) + math.log(0.5)) / 2
    assert sum(levels) / len(levels) == pytest.approx(middle, abs=0.1)
    assert math.log(0.01) <= min(levels) < math.log(0.0102)
    assert math.log(0.49) < max(levels) <= math.log(0.5) + 1e-6


def test_degenerate_bounds() -> None:
    found = one(thresholds=(0.2, 0.2), depths=(3, 3), window=LENGTH)
    assert found.thresholds.tolist() == pytest.approx([0.2] * 8)
    assert found.depths.tolist() == [[3] * LENGTH] * 8
    assert found.starts.tolist() == [0] * 8
    assert found.rows.dtype == found.starts.dtype == found.depths.dtype == torch.int64
    assert found.thresholds.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    """Lightning's 64-true and bf16-true set one for the whole step."""
    model, ids = tiny_model("llama").train(), tiny_prompt(12, batch=4)
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            found.append(DensityLoss(model, share=0.5, crop=6, exits=0.0)(ids, step=3))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0].loss, found[1].loss)
    assert torch.equal(found[0].soft_size, found[1].soft_size)
