"""Sizes of the traces of some positions, and what those traces need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.graph import attention_maps, rowwise_sizes
from softtrace.graph.attention_maps import none_held
from softtrace.graph.masks import hard_masks, soft_masks
from softtrace.graph.rowwise_sizes import summed_heads, traces_at, traces_at_each
from softtrace.graph.sizes import held_traces_at, soft_size
from tests.support.live_bytes import LiveBytes
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import VERIFIED, tiny

LENGTH = 12
THRESHOLDS = (0.3, 0.08, 0.02, 0.004)


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi: parallel layers
def test_traces_of_chosen_positions_of_held_masks(family: str) -> None:
    """As they are counted on a GPU: attention edges stay that no position needs."""
    kind, options = VERIFIED[family][:2]
    model = tiny_model("llama") if family == "llama" else tiny(kind, **options)
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        importance = softtrace.edge_importance(model, ids)
    places = torch.tensor([[4, 9], [2, 11]])
    for tau in THRESHOLDS:
        masks = hard_masks(importance, tau)
        counts, needed = traces_at(masks, places)
        held_counts, held_needed = held_traces_at(masks, places)
        assert torch.equal(held_counts, counts)
        for ours, theirs, whole in zip(held_needed, needed, masks, strict=True):
            assert ours.attention is whole.attention
            for one, other in zip(ours.nodes(), theirs.nodes(), strict=True):
                assert torch.equal(one, other)


def test_soft_sizes_of_float64_are_not_rounded_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and gradients are those of maps that are held."""
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(LENGTH)
    weights = torch.full((1, LENGTH), 1 / LENGTH, dtype=torch.float64)

    def measured() -> tuple[Tensor, Tensor]:
        importance = softtrace.edge_importance(model, ids)
        size = soft_size(importance, soft_masks(importance, 0.05, 0.5), weights)
        return size.detach(), *torch.autograd.grad(size, model.model.layers[0].mlp.down_proj.weight)

    held = measured()
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 5)
    with none_held():
        made = measured()
    torch.testing.assert_close(made, held, atol=1e-14, rtol=1e-12)


def test_thresholds_that_are_counted_together_have_the_counts_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And who reaches whom is alive of so many alone as are counted together."""
    length = 64
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", length**2)
    model, ids = tiny_model("llama"), tiny_prompt(length)
    with torch.no_grad():
        importance = softtrace.edge_importance(model, ids)
    masks = [hard_masks(importance, tau) for tau in THRESHOLDS]
    alone = [traces_at(each)[0] for each in masks]
    peaks = []
    for together in (1, 2, 4):
        monkeypatch.setattr(rowwise_sizes, "_SWEPT", together)
        with torch.no_grad(), LiveBytes() as live:
            found = traces_at_each(importance.layers, masks, None)
        peaks.append(live.peak)
        for (counts, _), own in zip(found, alone, strict=True):
            assert torch.equal(counts, own)
    a_reach = length**2 * 4
    assert peaks[0] + 2 * a_reach < peaks[1]
    assert peaks[1] + 4 * a_reach < peaks[2]
    assert peaks[2] < 4 * 8 * a_reach


@pytest.mark.parametrize("heads", [255, 256])
def test_a_sum_over_heads_does_not_overflow_a_byte(heads: int) -> None:
    kept = torch.ones(1, heads, 2, 2, dtype=torch.bool)
    assert (summed_heads(kept, torch.float32) == heads).all()
