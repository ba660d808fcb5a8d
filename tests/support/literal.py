"""Between the library's tensors and the oracle's edges: slow, literal translations for tests."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import networkx as nx
import torch
from torch import Tensor

from softtrace.graph.edges import EDGE_KINDS, Edge, EdgeImportance, LayerEdges
from tests.support import oracle

SINGLE = EDGE_KINDS[1:]  # the kinds with one edge a node


def every_edge(layers: int, heads: int, length: int) -> Iterator[Edge]:
    """All edges that the tensors have room for, the impossible ones included."""
    for layer, target in itertools.product(range(layers), range(length)):
        for kind in SINGLE:
            yield Edge(kind, layer, target, -1, target)
        for head, source in itertools.product(range(heads), range(length)):
            yield Edge("attention", layer, target, head, source)


def value_of(layers: Sequence[LayerEdges], sequence: int, edge: Edge) -> float:
    """The number that stands for an edge, in masks or importances of a batch."""
    values = getattr(layers[edge.layer], edge.kind)[sequence]
    if edge.kind == "attention":
        return float(values[edge.head, edge.target, edge.source])
    return float(values[edge.target])


def edges_of(importance: EdgeImportance, sequence: int = 0) -> dict[Edge, float]:
    """Importance of every existing edge of one row."""
    layers, _, heads, length = importance.shape
    lists = [layer.map(lambda part: part[sequence]) for layer in importance.layers]
    numbers = [{kind: getattr(layer, kind).tolist() for kind in EDGE_KINDS} for layer in lists]
    seen = [visible[sequence].tolist() for visible in importance.visible]
    valid = importance.valid[sequence].tolist()
    found = {}
    for edge in every_edge(layers, heads, length):
        kind, layer, target, head, source = edge
        if kind == "attention" and seen[layer][target][source]:
            found[edge] = numbers[layer][kind][head][target][source]
        elif kind != "attention" and valid[target]:
            if kind == "mlp_residual" and importance.layers[layer].parallel:
                continue  # a parallel layer has one node a token, and one residual
            found[edge] = numbers[layer][kind][target]
    return found


def ends_of(edge: Edge, parallel: Collection[int]) -> tuple[oracle.Node, oracle.Node]:
    """The node an edge reads and the node it adds into; ``parallel`` layers have one a token."""
    if edge.layer not in parallel:
        return oracle.source_node(edge), oracle.target_node(edge)
    source = ("mlp", edge.layer - 1, edge.source) if edge.layer else ("embed", edge.source)
    return source, ("mlp", edge.layer, edge.target)


def graph_of(
    edges: dict[Edge, float], layers: int, length: int, parallel: Collection[int] = ()
) -> nx.MultiDiGraph:
    """The oracle's graph with these edges and importances."""
    graph = nx.MultiDiGraph(layers=layers, length=length)
    graph.add_nodes_from(("mlp", layers - 1, token) for token in range(length))
    for edge, importance in edges.items():
        graph.add_edge(*ends_of(edge, parallel), key=edge, edge=edge, importance=importance)
    return graph


def parallel_layers(importance: EdgeImportance) -> list[int]:
    """Indices of the layers with one node a token."""
    return [index for index, layer in enumerate(importance.layers) if layer.parallel]


def row_graph(importance: EdgeImportance, sequence: int = 0) -> nx.MultiDiGraph:
    """The oracle's graph of one row, with the library's importances."""
    layers, _, _, length = importance.shape
    return graph_of(edges_of(importance, sequence), layers, length, parallel_layers(importance))


def entry_values(ordered: oracle.Ordered) -> dict[Edge, float]:
    """Running minimum of the popped importances at each edge's entry."""
    lowest = itertools.accumulate((importance for _, importance in ordered), min)
    return dict(zip((edge for edge, _ in ordered), lowest, strict=True))


def differing_sizes(edges: Sequence[Edge], ordered: oracle.Ordered, slack: float) -> int:
    """Compare traces of every size with the oracle's; return for how many the sets differ.

    Where they differ, every edge in question must enter at the value at which the trace is cut,
    within the share ``slack`` of it (0: exact ties only).
    """
    values = entry_values(ordered)
    assert set(edges) == set(values)
    assert len(edges) == len(ordered)
    ours: set[Edge] = set()
    theirs: set[Edge] = set()
    differing = 0
    for edge, (expected, _) in zip(edges, ordered, strict=True):
        ours.add(edge)
        theirs.add(expected)
        cut = values[expected]
        questionable = ours ^ theirs
        differing += bool(questionable)
        assert all(abs(values[each] - cut) <= slack * cut for each in questionable)
    return differing


def visible_map(valid: Tensor, window: int | None) -> Tensor:
    """``[B, T, S]`` bool from padding and a sliding window, token by token."""
    batch, length = valid.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for row, target, source in itertools.product(range(batch), range(length), range(length)):
        near = oracle.is_visible(target, source, window)
        seen[row, target, source] = near and valid[row, target] and valid[row, source]
    return seen


def made_up_importance(
    seed: int,
    *,
    layers: int = 3,
    heads: int = 2,
    valid: Tensor | None = None,
    length: int = 5,
    windows: Sequence[int | None] = (None,),
    levels: int | None = None,
    parallel: Collection[int] = (),
    dtype: torch.dtype = torch.float64,
) -> EdgeImportance:
    """Random importances that need no model; with ``levels`` they take few values, so they tie."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(1, length, dtype=torch.bool) if valid is None else valid
    batch, length = valid.shape
    maps = [visible_map(valid, window) for window in windows]
    made, visible = [], []
    for layer in range(layers):
        seen = maps[layer % len(maps)]
        shapes = ((batch, heads, length, length), (batch, length), (batch, length))
        carried, residual, mlp = (
            torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        carried = carried.pow(3) * seen[:, None]
        total = carried.sum((1, 3)) + residual
        parts = [carried / total[:, None, :, None], residual / total, mlp, 1 - mlp]
        if levels is not None:
            parts = [(part * levels).ceil() / levels for part in parts]
        exists = [seen[:, None], valid, valid, valid & (layer not in parallel)]
        parts = [(part * there).to(dtype) for part, there in zip(parts, exists, strict=True)]
        made.append(LayerEdges(*parts, parallel=layer in parallel))
        visible.append(seen)
    return EdgeImportance(tuple(made), tuple(visible), valid)
