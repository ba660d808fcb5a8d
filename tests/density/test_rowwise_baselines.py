"""Baselines of long sequences: uniform scores, connected, and the same whatever the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.density.baselines import Baseline, baseline_scores
from softtrace.errors import InvalidInputError
from softtrace.graph import attention_maps
from softtrace.graph.edges import EdgeImportance, RowwiseEdges
from softtrace.graph.masks import hard_masks
from tests.support.tiny import tiny_model, tiny_prompt

LENGTH = 40


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> EdgeImportance:
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 7)
    with torch.no_grad():
        return softtrace.edge_importance(tiny_model("llama"), tiny_prompt(LENGTH, batch=2))


def flat(scores: EdgeImportance) -> Tensor:
    """``[B, E]`` of all existing edges."""
    there = [part for layer in scores.existing() for part in layer]
    values = [part for layer in scores.layers for part in layer]
    kept = torch.cat([each.flatten(1) for each in there], 1)
    found = torch.cat([each.flatten(1) for each in values], 1)
    return torch.stack([row[own] for row, own in zip(found, kept, strict=True)])


@pytest.mark.parametrize("kind", ["random_ranks", "least_important"])
def test_scores_are_uniform_over_the_edges(long: EdgeImportance, kind: Baseline) -> None:
    scores = baseline_scores(long, kind, keep_residual=True, seed=[3, 4])
    assert all(isinstance(layer, RowwiseEdges) for layer in scores.layers)
    values = flat(scores)
    assert ((values > 0) & (values <= 1)).all()
    for share in (0.1, 0.5, 0.9):  # residual edges are above every threshold
        kept = (values >= 1 - share).double().mean(1)
        assert kept.tolist() == pytest.approx([share, share], abs=0.03)


def test_the_least_important_come_in_the_order_of_their_ranks(
    long: EdgeImportance, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = flat(baseline_scores(long, "least_important", keep_residual=True))
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 1 << 40)
    with torch.no_grad():
        held = softtrace.edge_importance(tiny_model("llama"), tiny_prompt(LENGTH, batch=2))
    theirs = flat(baseline_scores(held, "least_important", keep_residual=True)).float()
    assert (ours - theirs).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["random_ranks", "least_important"])
def test_every_node_keeps_its_best_edge(long: EdgeImportance, kind: Baseline) -> None:
    scores = baseline_scores(long, kind, keep_residual=False, seed=0)
    for mask in hard_masks(scores, 0.99999):
        assert (mask.attention.any(3).any(1) | mask.attention_residual).all()
        assert (mask.mlp | mask.mlp_residual).all()


def test_blocks_batches_and_padding_change_no_random_score(
    long: EdgeImportance, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH, batch=2)

    def scores(ids: Tensor, mask: Tensor | None, seeds: list[int]) -> Tensor:
        with torch.no_grad():
            found = softtrace.edge_importance(model, ids, mask)
        return flat(baseline_scores(found, "random_ranks", keep_residual=True, seed=seeds))

    expected = flat(baseline_scores(long, "random_ranks", keep_residual=True, seed=[3, 4]))
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 3)
    assert torch.equal(scores(ids[1:], None, [4]), expected[1:])
    pad = torch.zeros(2, 5, dtype=torch.int64)
    mask = torch.cat((pad, torch.ones_like(ids)), 1)
    padded = scores(torch.cat((pad, ids), 1), mask, [3, 4])
    assert torch.equal(padded, expected)
    assert not torch.equal(scores(ids, None, [5, 4])[0], expected[0])


def test_as_many_seeds_as_sequences(long: EdgeImportance) -> None:
    with pytest.raises(InvalidInputError, match="seed: found 1 seeds for 2"):
        baseline_scores(long, "random_ranks", keep_residual=True, seed=[1])


@pytest.mark.thorough
def test_evaluate_measures_long_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is measured, row by row: equal to what is held, but for the baselines."""
    from softtrace.evaluation.measure import measure

    def measured() -> Any:
        return measure(
            tiny_model("llama"), tiny_prompt(24, batch=2), min_context=12, batch_size=2,
            extra_blocks=1, progress=lambda runs: None,
        )  # fmt: skip

    held = measured()
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 2000)
    made = measured()
    for name in ("entropy", "loss", "area", "size"):
        one, other = (torch.cat(getattr(each, name)) for each in (made, held))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for key, parts in made.baselines.items():
        assert (
            torch.cat(parts, 1).mean(1) - torch.cat(held.baselines[key], 1).mean(1)
        ).abs().max() < 0.25
