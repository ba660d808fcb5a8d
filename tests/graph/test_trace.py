"""Identities 2 and 4: the closure ranks all edges for all sizes; sizes come from reachability."""

from __future__ import annotations

import sys
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import softtrace
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import (
    EDGE_KINDS,
    Edge,
    EdgeImportance,
    LayerEdges,
    RowwiseEdges,
)
from softtrace.graph.masks import hard_masks, soft_masks
from softtrace.graph.sizes import edge_counts, total_edges
from softtrace.graph.trace import Trace, closure, extract_trace, trace_length
from tests.support import oracle, warm
from tests.support.literal import (
    edges_of,
    entry_values,
    graph_of,
    made_up_importance,
    parallel_layers,
    row_graph,
)
from tests.support.tiny import tiny_model, tiny_prompt

PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)


#: no layer, one in between, all: a parallel layer is reached from and leads to either kind
PARALLEL = st.sampled_from([(), (), (1,), (0, 1, 2)])


def padded_importance(
    seed: int, levels: int | None = None, parallel: tuple[int, ...] = ()
) -> EdgeImportance:
    return made_up_importance(
        seed, valid=PADDED, windows=(None, 3), levels=levels, parallel=parallel
    )


def kept_graph(importance: EdgeImportance, row: int, tau: float) -> nx.MultiDiGraph:
    layers, _, _, length = importance.shape
    kept = {edge: score for edge, score in edges_of(importance, row).items() if score >= tau}
    return graph_of(kept, layers, length, parallel_layers(importance))


def counted(graph: nx.MultiDiGraph, position: int, layers: int) -> list[list[float]]:
    """Edges that reach the output node, by layer and kind, one by one."""
    counts = [[0.0] * len(EDGE_KINDS) for _ in range(layers)]
    for edge, _ in oracle.best_first(graph, position):
        counts[edge.layer][EDGE_KINDS.index(edge.kind)] += 1
    return counts


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), levels=st.sampled_from([None, 1, 3, 10]), parallel=PARALLEL)
def test_closure_values_are_the_running_minimum_of_the_search(
    seed: int, levels: int | None, parallel: tuple[int, ...]
) -> None:
    """Identity 2, number for number, for every edge of every position of a padded batch."""
    importance = padded_importance(seed, levels, parallel)
    layers, _, heads, length = importance.shape
    for row, position in PADDED.nonzero().tolist():
        values = closure(importance, row, position)
        expected = entry_values(oracle.best_first(row_graph(importance, row), position))
        found: dict[Edge, float] = {}
        for layer in range(layers):
            for kind in EDGE_KINDS[1:]:
                for t, value in enumerate(getattr(values[layer], kind).tolist()):
                    found[Edge(kind, layer, t, -1, t)] = value
            for h in range(heads):
                for t in range(length):
                    for s, value in enumerate(values[layer].attention[h, t].tolist()):
                        found[Edge("attention", layer, t, h, s)] = value
        assert {edge: value for edge, value in found.items() if value >= 0} == expected
        assert {value for edge, value in found.items() if edge not in expected} <= {-1.0}


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.001, 0.99), parallel=PARALLEL)
def test_counts_of_masks_equal_counting_one_by_one(
    seed: int, tau: float, parallel: tuple[int, ...]
) -> None:
    """Identity 4: reachability times in-degree, by layer and kind, for every position."""
    importance = padded_importance(seed, parallel=parallel)
    counts = edge_counts(hard_masks(importance, tau))
    totals = total_edges(importance)
    layers = importance.shape[0]
    assert totals.dtype == torch.int64
    for row in range(len(PADDED)):
        graph, everything = kept_graph(importance, row, tau), row_graph(importance, row)
        for position, valid in enumerate(PADDED[row].tolist()):
            if valid:
                assert counts[row, position].tolist() == counted(graph, position, layers)
                assert totals[row, position] == oracle.reachable_edges(everything, position)
            else:
                assert totals[row, position] == 0


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_totals_of_a_model_equal_counting_one_by_one(family: str) -> None:
    model, input_ids = tiny_model(family), tiny_prompt(9)
    with torch.no_grad():
        totals = total_edges(softtrace.edge_importance(model, input_ids))[0]
    graph = oracle.build_graph(oracle.run_full(model, input_ids))
    assert totals.tolist() == [oracle.reachable_edges(graph, t) for t in range(9)]


@pytest.mark.thorough
def test_counts_stay_exact_beyond_float32() -> None:
    """|E| of a real size does not fit float32, neither in one layer nor summed over layers."""
    for heads, length, layers in ((64, 600, 2), (16, 1000, 9)):
        nodes = torch.ones(1, 1, dtype=torch.bool).expand(1, length)
        all_seen = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, heads, length, length)
        counts = edge_counts([LayerEdges(all_seen, nodes, nodes, nodes)] * layers)
        below = length * (heads * length + 3)  # nothing here is causal: all nodes are reached
        own = heads * length + 3
        assert below * (layers - 1) + own > 1 << 24
        assert (below * (layers - 1) + own) % 2  # an odd number: rounding would show
        assert (counts.sum((2, 3)).long() == below * (layers - 1) + own).all()
        shares = torch.zeros(1).expand(1, heads, length, length)
        edges = LayerEdges(shares, *(torch.zeros(1).expand(1, length),) * 3)
        everything = EdgeImportance((edges,) * layers, (all_seen[:, 0],) * layers, nodes)
        assert (total_edges(everything) == below * (layers - 1) + own).all()


@pytest.mark.parametrize("parallel", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("soft", [False, True])
def test_layers_counted_one_by_one_or_together_are_the_same(
    monkeypatch: pytest.MonkeyPatch, parallel: tuple[int, ...], soft: bool
) -> None:
    importance = padded_importance(3, parallel=parallel)
    masks = soft_masks(importance, 0.1, 0.5) if soft else hard_masks(importance, 0.1)
    together = edge_counts(masks)
    for layers in (1, 2):
        monkeypatch.setattr(
            "softtrace.graph.attention_maps.CHUNK_ELEMENTS", 16 * layers * PADDED.numel() * 5
        )
        assert torch.equal(edge_counts(masks), together)


@pytest.mark.parametrize("rowwise", [False, True])
def test_more_heads_than_a_byte_counts(rowwise: bool) -> None:
    nodes = torch.ones(1, 3, dtype=torch.bool)
    kept = torch.ones(3, 3, dtype=torch.bool).tril().expand(1, 256, 3, 3)
    counts = edge_counts([(RowwiseEdges if rowwise else LayerEdges)(kept, nodes, nodes, nodes)])
    assert counts[0, :, 0, 0].tolist() == [256, 512, 768]


def test_counts_stay_exact_under_autocast() -> None:
    importance = made_up_importance(0, length=40, heads=8)
    masks = hard_masks(importance, 1e-4)
    counts, totals = edge_counts(masks), total_edges(importance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(edge_counts(masks), counts)
        assert torch.equal(total_edges(importance), totals)
    graph = row_graph(importance)
    assert totals[0, -1] == oracle.reachable_edges(graph, 39)


def test_soft_counts_of_a_chain_by_hand() -> None:
    """One layer, two tokens: the out-edges' clamped sum times the in-degrees."""
    attention = torch.tensor([[[[0.5, 0.0], [0.25, 0.5]]]])
    layer = LayerEdges(
        attention,
        torch.tensor([[0.5, 0.25]]),
        torch.tensor([[0.5, 0.9]]),
        torch.tensor([[0.25, 0.8]]),
    )
    counts = edge_counts([layer])
    first = [0.75 * 0.5, 0.75 * 0.5, 0.5, 0.25]
    second = [1.0 * 0.75, 1.0 * 0.25, 0.9, 0.8]  # 0.9 + 0.8 is clamped at 1
    torch.testing.assert_close(counts[0, :, 0], torch.tensor([first, second]))


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([None, 2, 6]),
    parallel=PARALLEL,
    data=st.data(),
)
def test_traces_are_nested(
    seed: int, levels: int | None, parallel: tuple[int, ...], data: Any
) -> None:
    importance = padded_importance(seed, levels, parallel)
    row, position = data.draw(st.sampled_from(PADDED.nonzero().tolist()))
    total = int(total_edges(importance)[row, position])
    small, big = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    inner = extract_trace(importance, row, position, size=small)
    outer = extract_trace(importance, row, position, size=big)
    assert len(inner.edges) == small
    assert outer.edges[:small] == inner.edges
    assert len(set(outer.edges)) == big


@pytest.mark.parametrize("parallel", [(), (1,), (0, 1, 2)])
def test_a_trace_at_a_threshold_is_what_the_masks_keep(parallel: tuple[int, ...]) -> None:
    importance = padded_importance(3, parallel=parallel)
    for tau in (0.5, 0.1, 0.02):
        counts = edge_counts(hard_masks(importance, tau)).sum((2, 3))
        for row, position in PADDED.nonzero().tolist():
            kept = oracle.trace_at_threshold(
                oracle.best_first(row_graph(importance, row), position), tau
            )
            trace = extract_trace(importance, row, position, size=int(counts[row, position]))
            assert set(trace.edges) == {edge for edge, _ in kept}


def test_sizes_as_counts_and_as_shares() -> None:
    importance = padded_importance(0)
    total = int(total_edges(importance)[0, -1])
    empty = Trace((), (), total)
    assert extract_trace(importance, size=0) == extract_trace(importance, size=0.0) == empty
    assert empty.size == 0.0
    whole = extract_trace(importance, size=1.0)
    assert whole == extract_trace(importance, size=total)
    assert len(whole.edges) == len(whole.importances) == whole.total == total
    assert whole.size == 1.0
    assert len(extract_trace(importance, size=1).edges) == 1
    assert len(extract_trace(importance, size=1e-6).edges) == 1  # rounded up
    half = extract_trace(importance, size=0.5)
    assert len(half.edges) == -(-total // 2)
    assert half.size == len(half.edges) / total
    edges = edges_of(importance)
    assert all(edges[e] == s for e, s in zip(whole.edges, whole.importances, strict=True))
    assert extract_trace(importance, size=2) == extract_trace(importance, -3, -1, size=2)
    assert extract_trace(importance, 0, 4, 2) == extract_trace(importance, 0, -1, 2)


def test_a_trace_that_could_not_be_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent of 8,192 tokens' edges are 88 million, each an object: hours, and 16 GB."""
    importance = padded_importance(0)
    monkeypatch.setattr("softtrace.graph.trace.MOST_EDGES", 5)
    assert len(extract_trace(importance, size=5).edges) == 5
    with pytest.raises(InvalidInputError, match=r"found 6 edges, .* allowed are at most 5, .*1000"):
        extract_trace(importance, size=6)


@pytest.mark.parametrize(
    ("size", "total", "edges"),
    [
        (0, 9, 0),
        (9, 9, 9),
        (0.0, 9, 0),
        (1.0, 9, 9),
        (0.29, 100, 29),
        (0.291, 100, 30),
        (1e-4, 9, 1),
    ],
)
def test_length_of_a_trace(size: float, total: int, edges: int) -> None:
    assert trace_length(size, total) == edges


def test_an_integer_of_numpy_or_torch_counts_edges() -> None:
    """As a share of all edges, 1 would be the whole graph."""
    for size in (np.int64(1), torch.tensor(1)):
        assert trace_length(size, 9) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence": 3}, "sequence: found 3, allowed -3 to 2"),
        ({"sequence": -4}, "sequence: found -4"),
        ({"position": 5}, "position: found 5, allowed -5 to 4"),
        ({"position": -6}, "position: found -6"),
        ({"position": True}, "position: found True, allowed are integers"),
        ({"position": 1.0}, "position: found 1.0, allowed are integers"),
        ({"position": torch.tensor(1.0)}, r"position: found tensor\(1.\), allowed are integers"),
        ({"position": torch.tensor(True)}, r"position: found tensor\(True\), allowed are integers"),
        ({"sequence": "1"}, "sequence: found '1', allowed are integers"),
        ({"sequence": 1, "position": 1}, "position 1 of sequence 1 is padding"),
        ({"sequence": 2, "position": 4}, "position 4 of sequence 2 is padding"),
        ({"size": 10_000}, "size: found 10000 edges, allowed 0 to"),
        ({"size": -1}, "size: found -1 edges"),
        ({"size": 1.01}, r"found 1.01, allowed \[0, 1\]"),
        ({"size": -0.5}, "found -0.5"),
        ({"size": float("nan")}, "found nan"),
        ({"size": True}, "found True"),
    ],
)
def test_rows_positions_and_sizes_that_do_not_exist(arguments: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        extract_trace(padded_importance(0), **arguments)


def test_importances_with_gradients_are_fine() -> None:
    importance = softtrace.edge_importance(tiny_model("llama"), tiny_prompt(5))
    assert importance.layers[0].mlp.requires_grad
    trace = extract_trace(importance, size=0.1)
    assert trace == extract_trace(importance.detach(), size=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("setting", "exact"),
    [
        ("pass", True),
        ("torch.backends.fp32_precision = 'ieee'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", False),
        ("torch.backends.fp32_precision = 'tf32'", False),
        ("torch.set_float32_matmul_precision('high')", False),
    ],
)
def test_any_way_to_ask_for_rounded_products_is_understood(setting: str, exact: bool) -> None:
    # a process of its own: PyTorch cannot take such a setting back
    program = (
        f"import torch; {setting}; from softtrace.graph.sizes import _products_exact as exact; "
        "print(exact(1000, torch.device('cpu')))"
    )
    command = [sys.executable, "-c", program]
    output = warm.run(command, check=True, capture_output=True).stdout
    assert output.split() == [str(exact)]
