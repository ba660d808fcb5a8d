"""Traces of single positions hold the edges that the sweep over all positions counts, no others."""

from __future__ import annotations

import pytest
import torch

from softtrace.graph import reach
from softtrace.graph.edges import LayerEdges
from softtrace.graph.reach import rows_at_once, traces_of
from softtrace.graph.sizes import edge_counts

BATCH, HEADS, LENGTH = 2, 3, 6


def random_masks(parallel: list[bool], density: float, seed: int = 0) -> list[LayerEdges]:
    generator = torch.Generator().manual_seed(seed)

    def kept(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < density

    return [
        LayerEdges(
            kept(BATCH, HEADS, LENGTH, LENGTH).tril(),
            kept(BATCH, LENGTH),
            kept(BATCH, LENGTH),
            torch.zeros(BATCH, LENGTH, dtype=torch.bool) if each else kept(BATCH, LENGTH),
            each,
        )
        for each in parallel
    ]


@pytest.mark.parametrize("parallel", [[False] * 4, [True] * 4, [False, True, True, False]])
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_a_trace_holds_what_is_counted_for_its_position(
    parallel: list[bool], density: float
) -> None:
    masks = random_masks(parallel, density)
    counts = edge_counts(masks)
    rows, positions = (torch.ones(BATCH, LENGTH) > 0).nonzero().T
    traces = traces_of(masks, rows, positions)
    held = torch.stack(
        [torch.stack([part.flatten(1).sum(1) for part in layer], -1) for layer in traces], 1
    )
    assert torch.equal(held.double(), counts[rows, positions])
    for layer, own in zip(masks, traces, strict=True):
        assert own.parallel is layer.parallel
        for part, kept in zip(layer, own, strict=True):
            assert not (kept & ~part[rows]).any()
    again = edge_counts(traces)
    assert torch.equal(again[torch.arange(len(rows)), positions], counts[rows, positions])


@pytest.mark.parametrize(("share", "rows"), [(0, 1), (1, 1), (2.9, 2), (3, 3)])
def test_as_many_sequences_as_their_masks_allow(
    share: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 4 * HEADS * LENGTH**2
    monkeypatch.setattr(reach, "_MASK_ELEMENTS", int(share * one))
    assert rows_at_once(random_masks([False] * 4, 0.5)) == rows
