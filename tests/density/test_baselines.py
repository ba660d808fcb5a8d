"""Badly chosen subgraphs: dense ranks, connected, residual edges kept where asked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from softtrace.density.baselines import baseline_scores, baseline_thresholds
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EdgeImportance
from softtrace.graph.masks import hard_masks
from softtrace.graph.sizes import edge_counts, total_edges
from tests.support import oracle
from tests.support.literal import edges_of, every_edge, graph_of, made_up_importance, value_of

PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
KINDS: Any = ("random_ranks", "least_important")


def importance() -> EdgeImportance:
    return made_up_importance(0, valid=PADDED, windows=(None, 3))


@pytest.mark.parametrize("keep_residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_dense_ranks_of_the_existing_edges(kind: Any, keep_residual: bool) -> None:
    rich = importance()
    scores = baseline_scores(rich, kind, keep_residual=keep_residual)
    layers, batch, heads, length = rich.shape
    for row in range(batch):
        existing = edges_of(rich, row)
        count, lifted = len(existing), []
        found = {}
        for edge in every_edge(layers, heads, length):
            score = value_of(scores.layers, row, edge)
            if edge not in existing:
                assert score == 0
            elif score == 1:
                lifted.append(edge)
            else:
                found[edge] = score
        ranks = sorted(round((1 - score) * count) for score in found.values())
        assert len(set(ranks)) == len(ranks) == count - len(lifted)
        assert all(
            (1 - score) * count == pytest.approx(round((1 - score) * count), abs=1e-6)
            for score in found.values()
        )
        assert ranks[0] >= 1
        assert ranks[-1] == count - 1  # one threshold a rank: 1 - f keeps the share f
        nodes = {oracle.target_node(edge) for edge in existing}
        if keep_residual:
            residual = {edge for edge in existing if edge.kind.endswith("residual")}
            assert residual <= set(lifted)
            assert len(lifted) <= len(residual) + 1  # the best of the others has rank 0
        else:
            assert len(lifted) == len({oracle.target_node(edge) for edge in lifted}) == len(nodes)
        if kind == "least_important":
            in_order = sorted(found, key=found.__getitem__, reverse=True)
            values = [existing[edge] for edge in in_order]
            assert values == sorted(values)


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
    shares = [1 - tau for tau in baseline_thresholds(5)]
    assert shares[0] == pytest.approx(1e-5)
    assert shares[-1] == pytest.approx(0.9)
    ratios = [b / a for a, b in itertools.pairwise(shares)]
    assert ratios == pytest.approx([ratios[0]] * 4)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="baseline: found 'worst', allowed are"):
        baseline_scores(importance(), "worst", keep_residual=True)  # type: ignore[arg-type]
