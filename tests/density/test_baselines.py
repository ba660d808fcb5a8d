"""Badly chosen subgraphs: uniform scores, connected, the same at all lengths and in all batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.density.baselines import Baseline, baseline_scores, baseline_thresholds
from softtrace.errors import InvalidInputError
from softtrace.graph import attention_maps
from softtrace.graph.attention_maps import Rows
from softtrace.graph.edges import EdgeImportance, RowwiseEdges
from softtrace.graph.masks import hard_masks
from softtrace.graph.sizes import edge_counts, total_edges
from tests.support import oracle
from tests.support.literal import edges_of, every_edge, graph_of, made_up_importance, value_of
from tests.support.tiny import tiny_model, tiny_prompt

PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
KINDS: Any = ("random_ranks", "least_important")


def importance() -> EdgeImportance:
    return made_up_importance(0, valid=PADDED, windows=(None, 3))


@pytest.mark.parametrize("keep_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_existing_edge_has_a_score(kind: Any, keep_residual: bool) -> None:
    """The least important have their rank, as shares of the sequence's edges."""
    rich = importance()
    scores = baseline_scores(rich, kind, keep_residual=keep_residual)
    layers, batch, heads, length = rich.shape
    for row in range(batch):
        existing = edges_of(rich, row)
        lifted, found = set(), {}
        for edge in every_edge(layers, heads, length):
            score = value_of(scores.layers, row, edge)
            if edge not in existing:
                assert score == 0
            elif score == 1:
                lifted.add(edge)
            else:
                found[edge] = score
        assert len(set(found.values())) == len(found) == len(existing) - len(lifted)
        assert min(found.values()) > 0
        nodes = {oracle.target_node(edge) for edge in existing}
        if keep_residual:
            residual = {edge for edge in existing if edge.kind.endswith("residual")}
            assert residual <= lifted
            assert len(lifted) <= len(residual) + 1  # a random number may be the highest too
        else:
            assert len(lifted) == len({oracle.target_node(edge) for edge in lifted}) == len(nodes)
        if kind == "least_important":
            in_order = sorted(existing, key=existing.__getitem__)
            for rank, edge in enumerate(in_order):
                if edge in found:  # each alone in its bin of the histogram
                    assert rank - 1e-3 <= (1 - found[edge]) * len(existing) <= rank + 1 + 1e-3


def test_without_kept_residuals_each_nodes_best_edge_is_lifted() -> None:
    rich = importance()
    scores = baseline_scores(rich, "least_important", keep_residual=False)
    for row in range(len(PADDED)):
        existing = edges_of(rich, row)
        least: dict[oracle.Node, tuple[float, Any]] = {}
        for edge, value in existing.items():
            node = oracle.target_node(edge)
            least[node] = min(least.get(node, (2.0, edge)), (value, edge))
        for edge in existing:
            lifted = value_of(scores.layers, row, edge) == 1
            assert lifted == (least[oracle.target_node(edge)][1] == edge)


@pytest.mark.parametrize("keep_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_threshold_the_output_is_connected_to_an_embedding(
    kind: Any, keep_residual: bool
) -> None:
    rich = importance()
    scores = baseline_scores(rich, kind, keep_residual=keep_residual)
    layers, _, _, length = rich.shape
    totals = total_edges(rich)
    before = torch.zeros_like(totals)
    for tau in (1.0, *sorted(baseline_thresholds(), reverse=True), 0.0):
        counts = edge_counts(hard_masks(scores, tau)).sum((2, 3)).long()
        for row, position in PADDED.nonzero().tolist():
            kept = {e: s for e, s in edges_of(scores, row).items() if s >= tau}
            ordered = oracle.best_first(graph_of(kept, layers, length), position)
            assert counts[row, position] == len(ordered)
            assert any(edge.layer == 0 and edge.kind.startswith("attention") for edge, _ in ordered)
        assert (counts >= before)[PADDED].all()
        before = counts
    assert torch.equal(before[PADDED], totals[PADDED])


def test_random_scores_follow_the_seed_and_nothing_else() -> None:
    state = torch.get_rng_state()
    rich, other = importance(), made_up_importance(9, valid=PADDED, windows=(None, 3))
    same = {"kind": "random_ranks", "keep_residual": True}
    first = baseline_scores(rich, **same)  # type: ignore[arg-type]
    for again in (
        baseline_scores(rich, **same),  # type: ignore[arg-type]
        baseline_scores(other, **same),  # type: ignore[arg-type]
    ):
        for one, two in zip(first.layers, again.layers, strict=True):
            assert torch.equal(one.attention, two.attention)
    differs = baseline_scores(rich, seed=1, **same)  # type: ignore[arg-type]
    assert not torch.equal(first.layers[0].attention, differs.layers[0].attention)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):  # nor the default device
        again = baseline_scores(rich, **same)  # type: ignore[arg-type]
    assert torch.equal(first.layers[2].mlp, again.layers[2].mlp)


def test_thresholds_keep_a_geometric_share() -> None:
    shares = [1 - tau for tau in baseline_thresholds()]
    assert shares[0] == pytest.approx(1e-5)
    assert shares[-1] == pytest.approx(0.9)
    ratios = [b / a for a, b in itertools.pairwise(shares)]
    assert ratios == pytest.approx([ratios[0]] * 13)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="baseline: found 'worst', allowed are"):
        baseline_scores(importance(), "worst", keep_residual=True)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_uniform_over_the_edges(long: EdgeImportance, kind: Baseline) -> None:
    scores = baseline_scores(long, kind, keep_residual=True, seed=[3, 4])
    assert all(isinstance(layer, RowwiseEdges) for layer in scores.layers)
    values = flat(scores)
    assert ((values > 0) & (values <= 1)).all()
    for share in (0.1, 0.5, 0.9):  # residual edges are above every threshold
        kept = (values >= 1 - share).double().mean(1)
        assert kept.tolist() == pytest.approx([share, share], abs=0.03)


@pytest.mark.parametrize("keep_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_row_by_row_are_those_of_held_maps(
    long: EdgeImportance, monkeypatch: pytest.MonkeyPatch, kind: Baseline, keep_residual: bool
) -> None:
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 1 << 40)
    with torch.no_grad():
        held = softtrace.edge_importance(tiny_model("llama"), tiny_prompt(LENGTH, batch=2))
    ours, theirs = (
        baseline_scores(each, kind, keep_residual=keep_residual) for each in (long, held)
    )
    assert not any(isinstance(layer, RowwiseEdges) for layer in theirs.layers)
    assert (flat(ours) - flat(theirs)).abs().max() < 1e-3  # in the last digit of an importance


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_keeps_its_best_edge(long: EdgeImportance, kind: Baseline) -> None:
    scores = baseline_scores(long, kind, keep_residual=False, seed=0)
    for mask in hard_masks(scores, 0.99999):
        assert (mask.attention.any(3).any(1) | mask.attention_residual).all()
        assert (mask.mlp | mask.mlp_residual).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_keeps_its_best_edge_where_rows_are_made_alone(
    long: EdgeImportance, kind: Baseline
) -> None:
    """They round otherwise than in a block, as rows that one position needs do."""
    scores = baseline_scores(long, kind, keep_residual=False, seed=0)
    for mask in hard_masks(scores, 0.99999):
        for at in range(LENGTH):
            kept = mask.attention_map.rows(Rows(slice(at, at + 1), at + 1))
            assert (kept.flatten(1).any(1) | mask.attention_residual[:, at]).all()


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


def test_an_importance_of_1_is_the_least_rare() -> None:
    rich = importance()
    rich.layers[0].mlp[:], rich.layers[0].mlp_residual[:] = 1.0, 0.0
    scores = baseline_scores(rich, "least_important", keep_residual=True)
    first, second = (
        [row[there] for row, there in zip(layer.mlp, exists.mlp, strict=True)]
        for layer, exists in zip(scores.layers[:2], rich.existing()[:2], strict=True)
    )
    for least, others in zip(first, second, strict=True):
        assert 0 < least.min() <= least.max() < others.min()
