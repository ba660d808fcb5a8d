"""Draws of exits: pure, apart from each other, stratified, and blind to padding."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softtrace.loss.draws import _smallest, draw_exits


@settings(max_examples=60)
@given(
    seed=st.integers(),
    step=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 50)),
    density=st.floats(0.0, 1.0),
    share=st.floats(0.01, 1.0),
    low=st.integers(1, 4),
    more=st.integers(0, 7),
)
def test_draws_of_exits_are_pure_apart_and_stratified(
    seed: int,
    step: int,
    shape: tuple[int, int],
    density: float,
    share: float,
    low: int,
    more: int,
) -> None:
    counted = torch.rand(shape, generator=torch.Generator().manual_seed(step)) < density
    total, real = counted.numel(), int(counted.sum())
    arguments: dict[str, Any] = {
        "seed": seed, "rank": 1, "counted": counted, "bounds": (low, low + more), "share": share,
    }  # fmt: skip
    drawn, again = (draw_exits(**arguments, step=(step, 0)) for _ in range(2))
    for ours, other in zip(vars(drawn).values(), vars(again).values(), strict=True):
        assert torch.equal(ours, other)
    places, depths, used = drawn.places, drawn.depths, drawn.used
    assert len(places) == len(depths) == len(used) == max(1, round(share * total))
    assert len(places[used].unique()) == len(places[used])
    assert 0 <= places.min() <= places.max() < total
    assert counted.flatten()[places].all() or real == 0
    assert abs(int(used.sum()) - min(real, max(1, share * real))) <= 0.5 + 1e-3
    assert low <= depths[0] <= depths[-1] <= low + more
    assert torch.equal(depths, depths.sort().values)
    for each in (depths, depths[used]):
        if len(each):
            found = each.bincount(minlength=low + more + 1)[low:]
            assert (found - len(each) / (more + 1)).abs().max() < 3


def test_padding_changes_no_draw() -> None:
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    padded = torch.zeros(5, 51, dtype=torch.bool)
    padded[1:4, 7:47] = real
    for step in range(20):
        small, large = (
            draw_exits(seed=1, step=(step, 0), rank=0, counted=each, share=0.3, bounds=(2, 9))
            for each in (real, padded)
        )
        pairs = []
        for drawn, width, row, column in ((small, 40, 0, 0), (large, 51, 1, 7)):
            places, depths = drawn.places[drawn.used], drawn.depths[drawn.used]
            found = [(p // width - row, p % width - column) for p in places.tolist()]
            pairs.append(sorted(zip(found, depths.tolist(), strict=True)))
        assert pairs[0] == pairs[1]


def test_tokens_of_a_padded_batch_are_read_at_all_depths_and_all_get_their_turn() -> None:
    counted = torch.zeros(4, 50, dtype=torch.bool)
    counted[:2] = True
    seen, depths = torch.zeros(200), torch.zeros(9)
    for step in range(200):
        drawn = draw_exits(
            seed=0, step=(step, 0), rank=0, counted=counted, share=0.25, bounds=(1, 8)
        )
        assert drawn.used.sum() == 25
        seen[drawn.places[drawn.used]] += 1
        depths += drawn.depths[drawn.used].bincount(minlength=9)
    assert (seen.view(4, 50)[2:] == 0).all()
    assert seen[:100].min() > 20  # 50 on average
    assert (depths[1:] / 5000 - 1 / 8).abs().max() < 0.02


def test_equal_keys_come_as_a_stable_sort_has_them() -> None:
    few = torch.randint(50, (3000,), generator=torch.Generator().manual_seed(0))
    keys = 0.75 + few / 2**24  # neighbours, as close as float32 is drawn
    assert torch.equal(_smallest(keys, 700), keys.sort(stable=True).indices[:700])
