"""Identity 2: traces as a bottleneck closure, and in the order of the search.

Source: Kervadec et al., arXiv 2605.27033, section 3: the s-Trace is found by best-first search
backwards from the output node.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrace.checks import check_range
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import Edge, EdgeImportance, EdgeKind, LayerEdges

_UNREACHED = -1.0  # below every importance, so that (max, min) keeps unreached nodes out


def trace_length(size: float | int, total: int) -> int:
    """Number of edges of a trace: an int is a count, a float a share s of |E|, rounded up.

    Raises:
        InvalidInputError: a share outside [0, 1] or a count outside [0, |E|].
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if not 0 <= size <= total:
            raise InvalidInputError(f"size: found {size} edges, allowed 0 to |E| = {total}")
        return size
    check_range("size (a float is a share of |E|)", size, 0.0, 1.0)
    return math.ceil(size * total - 1e-9)


@dataclass(frozen=True)
class Trace:
    """An s-Trace.

    Attributes:
        edges: in order of entry.
        importances: of those edges.
        total: |E| of the explained position.
    """

    edges: tuple[Edge, ...]
    importances: tuple[float, ...]
    total: int

    @property
    def size(self) -> float:
        """Share of |E|."""
        return len(self.edges) / self.total


def closure(importance: EdgeImportance, sequence: int, position: int) -> list[LayerEdges]:
    """Identity 2: min(importance, value of the target) of every edge, for one output node.

    An edge's value is the running minimum of the importances popped by the best-first search when
    it enters, so edges sorted by value are the traces of all sizes, up to order inside ties.

    Returns:
        Per layer, ``[H, T, S]`` and ``[T]`` tensors (no batch dimension); -1 where an edge does
        not exist or cannot reach the output node.
    """
    node = torch.full_like(importance.layers[0].mlp[sequence], _UNREACHED)
    node[position] = 1.0
    values = []
    for layer, seen in zip(reversed(importance.layers), reversed(importance.visible), strict=True):
        mlp = torch.minimum(layer.mlp[sequence], node)
        if layer.parallel:
            mlp_residual = torch.full_like(mlp, _UNREACHED)
        else:
            mlp_residual = torch.minimum(layer.mlp_residual[sequence], node)
            node = torch.maximum(mlp, mlp_residual)
        attention = torch.minimum(layer.attention[sequence], node[:, None])
        attention = attention.masked_fill(~seen[sequence], _UNREACHED)
        residual = torch.minimum(layer.attention_residual[sequence], node)
        node = torch.maximum(residual, attention.amax((0, 1)))
        if layer.parallel:  # its MLP reads the node that enters the layer
            node = torch.maximum(node, mlp)
        values.append(LayerEdges(attention, residual, mlp, mlp_residual, layer.parallel))
    return values[::-1]


def extract_trace(
    importance: EdgeImportance, sequence: int = 0, position: int = -1, size: float | int = 0.01
) -> Trace:
    """The s-Trace of one position: exact, in the search's own order also inside ties.

    The closure gives the lowest value that still enters; best-first search then runs over the
    edges at or above it alone.

    Args:
        importance: from :func:`softtrace.edge_importance`.
        sequence: row of the batch.
        position: token whose prediction is explained; negative counts from the row's end.
        size: a float is a share of |E|, an int a number of edges.

    Raises:
        InvalidInputError: no such row, position or size, or the position is padding.
    """
    _, batch, _, length = importance.shape
    for name, index, limit in (("sequence", sequence, batch), ("position", position, length)):
        if not -limit <= index < limit:
            raise InvalidInputError(f"{name}: found {index}, allowed {-limit} to {limit - 1}")
    sequence, position = sequence % batch, position % length
    if not bool(importance.valid[sequence, position]):
        raise InvalidInputError(f"position {position} of sequence {sequence} is padding")
    importance = importance.detach()
    values = closure(importance, sequence, position)
    flat = torch.cat([part.flatten() for layer in values for part in layer])
    flat = flat[flat > _UNREACHED]
    count = trace_length(size, flat.numel())
    if count == 0:
        return Trace((), (), flat.numel())
    cut = float(flat.kthvalue(flat.numel() - count + 1).values)
    found = list(_best_first(importance, sequence, position, count, cut))
    return Trace(tuple(edge for edge, _ in found), tuple(score for _, score in found), flat.numel())


def _best_first(
    importance: EdgeImportance, sequence: int, position: int, count: int, cut: float
) -> Iterator[tuple[Edge, float]]:
    """Heap search over edges of importance >= cut, in order of entry."""
    top = len(importance.layers) - 1
    heap: list[tuple[float, int, Edge]] = []
    pushed = 0
    reached = {(top, True, position)}
    frontier = [(top, True, position)]
    for _ in range(count):
        while frontier:
            for score, edge in edges_into(importance, sequence, *frontier.pop(), cut):
                # The running number keeps the order of equal importances fixed.
                heapq.heappush(heap, (-score, pushed, edge))
                pushed += 1
        negative, _, edge = heapq.heappop(heap)
        yield edge, -negative
        node = origin(importance, edge)
        if node is not None and node not in reached:
            reached.add(node)
            frontier.append(node)


def origin(importance: EdgeImportance, edge: Edge) -> tuple[int, bool, int] | None:
    """The node an edge starts from as (layer, after its MLP?, token); None for the embedding."""
    if edge.kind in ("mlp", "mlp_residual") and not importance.layers[edge.layer].parallel:
        return edge.layer, False, edge.target
    return None if edge.layer == 0 else (edge.layer - 1, True, edge.source)


def edges_into(
    importance: EdgeImportance, sequence: int, layer: int, after_mlp: bool, token: int, cut: float
) -> Iterator[tuple[float, Edge]]:
    """Importance and name of every edge into a node, of those of importance >= ``cut``."""
    edges = importance.layers[layer]
    singles: list[tuple[EdgeKind, Tensor]] = []
    if after_mlp:
        singles.append(("mlp", edges.mlp))
        if not edges.parallel:
            singles.append(("mlp_residual", edges.mlp_residual))
    if edges.parallel or not after_mlp:
        singles.append(("attention_residual", edges.attention_residual))
        scores = edges.attention[sequence, :, token]
        keep = (scores >= cut) & importance.visible[layer][sequence, token]
        found = keep.nonzero().tolist()
        for (head, source), score in zip(found, scores[keep].tolist(), strict=True):
            yield score, Edge("attention", layer, token, head, source)
    for kind, values in singles:
        score = float(values[sequence, token])
        if score >= cut:
            yield score, Edge(kind, layer, token, -1, token)
