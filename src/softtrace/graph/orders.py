"""Subgraphs of one position that grow edge by edge from its output node, as ranks of the edges.

The first n edges of an order are a subgraph of exactly n edges, so that one order gives the masks
of all sizes. There are two: the best-first search's own, and a random one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softtrace.graph.edges import EDGE_KINDS, Edge, EdgeImportance, LayerEdges
from softtrace.graph.trace import edges_into, extract_trace, origin, real_place

NEVER = torch.iinfo(torch.int64).max
"""Rank of an edge that does not exist, or cannot reach the output node."""

Ranks = tuple[LayerEdges, ...]
"""Per layer int64 ``[H, T, S]`` and ``[T]``: how many edges entered before each; :data:`NEVER`."""


def search_order(importance: EdgeImportance, sequence: int = 0, position: int = -1) -> Ranks:
    """The order of the best-first search, also inside ties: the first n edges are the s-Trace.

    Takes about a microsecond and 200 bytes an edge of the graph.

    Args:
        importance, sequence, position: see :func:`softtrace.extract_trace`.

    Raises:
        InvalidInputError: no such row or position, or it is padding.
    """
    return ranks_of(importance, extract_trace(importance, sequence, position, 1.0).edges)


def random_order(
    importance: EdgeImportance, sequence: int = 0, position: int = -1, seed: int = 0
) -> Ranks:
    """A random connected subgraph that grows backwards from the output node.

    Again and again a node is drawn, all alike, among those reached that have edges left; of its
    edges the next one enters. A node's residual and MLP edges come before its attention edges, each
    in random order. Source: ``get_random_connected_subgraph`` of the authors of arXiv 2605.27033.

    Args:
        importance, sequence, position: see :func:`softtrace.extract_trace`; of the importances
            nothing is used but which edges exist.
        seed: of the draws.

    Raises:
        InvalidInputError: no such row or position, or it is padding.
    """
    sequence, position = real_place(importance, sequence, position)
    edges = _grown(importance.detach(), sequence, position, random.Random(seed))
    return ranks_of(importance, list(edges))


def _grown(
    importance: EdgeImportance, sequence: int, position: int, draw: random.Random
) -> Iterator[Edge]:
    left: dict[tuple[int, bool, int], list[Edge]] = {}
    frontier: list[tuple[int, bool, int]] = []

    def reach(node: tuple[int, bool, int]) -> None:
        edges = [edge for _, edge in edges_into(importance, sequence, *node, cut=0.0)]
        draw.shuffle(edges)
        # Taken from the end, and sorting keeps the random order of equals.
        left[node] = sorted(edges, key=lambda edge: edge.kind != "attention")
        frontier.append(node)

    reach((len(importance.layers) - 1, True, position))
    while frontier:
        place = draw.randrange(len(frontier))
        edges = left[frontier[place]]
        edge = edges.pop()
        yield edge
        if not edges:
            frontier[place] = frontier[-1]
            frontier.pop()
        node = origin(importance, edge)
        if node is not None and node not in left:
            reach(node)


def ranks_of(importance: EdgeImportance, edges: Sequence[Edge]) -> Ranks:
    """The places of edges in a list that holds each at most once.

    Args:
        importance: of the batch, for shapes and device.
        edges: in order of entry.
    """
    layers, _, heads, length = importance.shape
    attention = torch.full((layers, heads, length, length), NEVER)
    nodes = torch.full((len(EDGE_KINDS), layers, length), NEVER)
    number = {kind: at for at, kind in enumerate(EDGE_KINDS)}
    table = torch.tensor([(number[e.kind], *e[1:]) for e in edges], dtype=torch.int64)
    kind, layer, target, head, source = table.reshape(-1, 5).T
    rank = torch.arange(len(edges))
    a = kind == number["attention"]
    attention[layer[a], head[a], target[a], source[a]] = rank[a]
    nodes[kind[~a], layer[~a], target[~a]] = rank[~a]
    device = importance.valid.device
    attention, nodes = attention.to(device), nodes.to(device)
    return tuple(
        LayerEdges(attention[at], nodes[1, at], nodes[2, at], nodes[3, at], each.parallel)
        for at, each in enumerate(importance.layers)
    )


def first_edges(ranks: Ranks, counts: Tensor) -> tuple[LayerEdges, ...]:
    """The subgraphs of the first n edges, for several n, as masks of a batch.

    Args:
        ranks: of an order.
        counts: ``[K]`` int64, numbers of edges.

    Returns:
        Per layer bool ``[K, H, T, S]`` and ``[K, T]``.
    """

    def entered(part: Tensor) -> Tensor:
        return part < counts.to(part.device).reshape(-1, *(1 for _ in part.shape))

    return tuple(layer.map(entered) for layer in ranks)


def complement(
    masks: Sequence[LayerEdges], existing: Sequence[LayerEdges]
) -> tuple[LayerEdges, ...]:
    """All existing edges that are not in the masks, and all residual edges.

    The "inverse" of arXiv 2605.27033: what is left of the model when a trace is taken out of it,
    but for the residual stream. Not :func:`softtrace.density.baselines.baseline_scores`, which
    takes as many edges as the trace has, the least important ones.

    Args:
        masks: per layer, bool ``[K, H, T, S]`` and ``[K, T]``.
        existing: of the sequence, ``[1, H, T, S]`` and ``[1, T]``.
    """
    rest = [
        replace(layer, attention=there.attention & ~layer.attention, mlp=there.mlp & ~layer.mlp)
        for layer, there in zip(masks, existing, strict=True)
    ]
    return with_residuals(rest, existing)


def with_residuals(
    masks: Sequence[LayerEdges], existing: Sequence[LayerEdges]
) -> tuple[LayerEdges, ...]:
    """The masks with all residual edges in; arguments as of :func:`complement`."""
    return tuple(
        replace(
            layer,
            attention_residual=there.attention_residual.expand_as(layer.attention_residual),
            mlp_residual=there.mlp_residual.expand_as(layer.mlp_residual),
        )
        for layer, there in zip(masks, existing, strict=True)
    )


def connected_from(ranks: Ranks) -> int:
    """How many edges an order takes until there is a path from an embedding to the output.

    Whatever enters is connected to the output, so this is the first edge that reads an embedding.

    Returns:
        A number of edges, at least 1; with fewer, the prediction depends on no token at all.
    """
    first = ranks[0]
    reading = [first.attention, first.attention_residual]
    if first.parallel:  # its MLP reads the node that enters the layer
        reading.append(first.mlp)
    return min(int(part.min()) for part in reading) + 1


def edges_entered(ranks: Ranks, counts: Tensor) -> Tensor:
    """How many of the first n edges belong to each layer and kind.

    Args:
        ranks: of an order.
        counts: ``[K]`` int64, rising numbers of edges.

    Returns:
        ``[K, L, 4]`` int64, kinds in the order of :data:`softtrace.graph.edges.EDGE_KINDS`.
    """
    counts = counts.to(ranks[0].mlp.device)
    # bucketize gives the first of the counts that holds the edge; beyond the last it is in none.
    entered = [
        torch.bucketize(part.flatten(), counts, right=True).bincount(minlength=len(counts) + 1)
        for layer in ranks
        for part in layer
    ]
    steps = torch.stack(entered)[:, : len(counts)].T
    return steps.cumsum(0).reshape(len(counts), len(ranks), len(EDGE_KINDS))
