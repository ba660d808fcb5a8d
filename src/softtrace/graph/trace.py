"""Identity 2: traces as a bottleneck closure, and in the order of the search.

Source: Kervadec et al., arXiv 2605.27033, section 3: the s-Trace is found by best-first search
backwards from the output node.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrace.checks import as_integer, check_range
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import Rows
from softtrace.graph.batch import ends_of
from softtrace.graph.edges import Edge, EdgeImportance, EdgeKind, LayerEdges
from softtrace.graph.sizes import total_edges

MOST_EDGES = 20_000_000
"""Edges of a trace that is listed edge by edge, which takes half an hour and 4 GB."""

_AT_LEAST = 1 << 20  # values that are held before the smaller ones are dropped
_UNREACHED = -1.0  # below every importance, so that (max, min) keeps unreached nodes out


def trace_length(size: float | int, total: int) -> int:
    """Number of edges of a trace: an int is a count, a float a share s of |E|, rounded up.

    Raises:
        InvalidInputError: a share outside [0, 1] or a count outside [0, |E|].
    """
    if (count := as_integer(size)) is not None:
        if not 0 <= count <= total:
            raise InvalidInputError(f"size: found {count} edges, allowed 0 to |E| = {total}")
        return count
    check_range("size (a float is a share of |E|)", size, 0.0, 1.0)
    return math.ceil(size * total - 1e-9)


@dataclass(frozen=True)
class Trace:
    """An s-Trace.

    Attributes:
        edges: Edges in order of entry.
        importances: Importances of those edges.
        total: |E| of the explained position.
    """

    edges: tuple[Edge, ...]
    importances: tuple[float, ...]
    total: int

    def __repr__(self) -> str:
        return f"Trace({len(self.edges):,} of {self.total:,} edges)"

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
    blank = torch.full_like(importance.layers[0].attention[sequence], _UNREACHED)
    found: list[LayerEdges] = []
    attention = blank.clone()

    def note(values: Tensor, rows: Rows) -> None:
        attention[:, rows.at, : rows.end] = values

    for layer, nodes in zip(
        reversed(importance.layers),
        _closure_layers(importance, sequence, position, note),
        strict=True,
    ):
        residual, mlp, mlp_residual = nodes
        found.append(LayerEdges(attention, residual, mlp, mlp_residual, layer.parallel))
        attention = blank.clone()
    return found[::-1]


def extract_trace(
    importance: EdgeImportance, sequence: int = 0, position: int = -1, size: float | int = 0.01
) -> Trace:
    """The s-Trace of one position: exact, in the search's own order also inside ties.

    The closure gives the lowest value that still enters; best-first search then runs over the
    edges at or above it alone.

    Args:
        importance: From :func:`softtrace.edge_importance`.
        sequence: Row of the batch.
        position: Token whose prediction is explained; negative ones count from the row's last real
            token.
        size: A float is a share of |E|, an int a number of edges.

    Raises:
        InvalidInputError: There is no such row, position or size, the position is padding, or the
            trace has more than :data:`MOST_EDGES`, as shares of long prompts' edges do.
    """
    sequence, position = real_place(importance, sequence, position)
    importance = importance.detach()
    places = torch.full((len(importance.valid), 1), position)
    total = int(total_edges(importance, places)[sequence, 0])
    count = trace_length(size, total)
    if count == 0:
        return Trace((), (), total)
    if count > MOST_EDGES:
        raise InvalidInputError(
            f"size: found {count:,} edges, {count / total:.2g} of |E| = {total:,}, allowed are at "
            f"most {MOST_EDGES:,}, as each is listed by name. Give a number of edges, such as "
            "size=1000; density_curve tells how large traces are without listing them"
        )
    cut = _lowest(importance, sequence, position, count)
    found = list(_best_first(importance, sequence, position, count, cut))
    while len(found) < count:  # in half precision single rows round otherwise than blocks of them
        cut *= 0.9
        found = list(_best_first(importance, sequence, position, count, cut))
    return Trace(tuple(edge for edge, _ in found), tuple(score for _, score in found), total)


def real_place(importance: EdgeImportance, sequence: int, position: int) -> tuple[int, int]:
    """Row and position from 0 on, where negative ones count from the end.

    Raises:
        InvalidInputError: no such row or position, or it is padding.
    """
    batch, length = importance.valid.shape
    sequence = _in_range("sequence", sequence, batch) % batch
    position = _in_range("position", position, length)
    if position < 0:
        position += int(ends_of(importance.valid)[sequence])
    if position < 0 or not bool(importance.valid[sequence, position]):
        raise InvalidInputError(
            f"position {position} of sequence {sequence} is padding; take one at which its "
            "attention_mask is 1, or count from its last token by -1, -2, ..."
        )
    return sequence, position


def _in_range(name: str, index: int, limit: int) -> int:
    number = as_integer(index)
    if number is None:
        raise InvalidInputError(f"{name}: found {index!r}, allowed are integers")
    if not -limit <= number < limit:
        raise InvalidInputError(f"{name}: found {number}, allowed {-limit} to {limit - 1}")
    return number


def _lowest(importance: EdgeImportance, sequence: int, position: int, count: int) -> float:
    """The count-th largest value of the :func:`closure`, or a little less.

    Of all values only the largest are held, and a block of rows.
    """
    best = importance.layers[0].mlp.new_empty(0)
    floor = _UNREACHED

    def note(values: Tensor, rows: Rows | None = None) -> None:
        nonlocal best, floor
        best = torch.cat((best, values[values > floor]))
        if len(best) > max(2 * count, _AT_LEAST):
            best = best.topk(count, sorted=False).values
            floor = float(best.min())

    for layer in _closure_layers(importance, sequence, position, note):
        for part in layer:
            note(part)
    # Rows that are made anew may differ in their last digit.
    return float(best.topk(count, sorted=False).values.min()) * (1 - 1e-5)


def _closure_layers(
    importance: EdgeImportance, sequence: int, position: int, note: Callable[[Tensor, Rows], None]
) -> Iterator[tuple[Tensor, ...]]:
    """Values of :func:`closure` of the edges of which a token has one, layer by layer from the top.

    Args:
        importance, sequence, position: see :func:`closure`.
        note: is given the values of attention edges ``[H, n, end]``, block by block.
    """
    node = torch.full_like(importance.layers[0].mlp[sequence], _UNREACHED)
    node[position] = 1.0
    for layer, seen in zip(reversed(importance.layers), reversed(importance.visible), strict=True):
        mlp = torch.minimum(layer.mlp[sequence], node)
        mlp_residual = torch.full_like(mlp, _UNREACHED)
        if not layer.parallel:
            mlp_residual = torch.minimum(layer.mlp_residual[sequence], node)
            node = torch.maximum(mlp, mlp_residual)
        residual = torch.minimum(layer.attention_residual[sequence], node)
        before = residual.clone()
        targets = (node > _UNREACHED).nonzero()[:, 0].cpu()
        for rows in layer.attention_map.blocks(targets):
            shares = layer.attention_map.rows(rows)[sequence]
            values = torch.minimum(shares, rows.of(node, 0)[:, None])
            values = values.masked_fill(~rows.edges_of(seen)[sequence], _UNREACHED)
            note(values, rows)
            before[: rows.end] = torch.maximum(before[: rows.end], values.amax((0, 1)))
        node = torch.maximum(before, mlp) if layer.parallel else before
        yield residual, mlp, mlp_residual


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
        if not heap:
            return
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
        scores = edges.attention_map.rows(Rows(slice(token, token + 1), token + 1))[sequence, :, 0]
        keep = (scores >= cut) & importance.visible[layer][sequence, token, : token + 1]
        found = keep.nonzero().tolist()
        for (head, source), score in zip(found, scores[keep].tolist(), strict=True):
            yield score, Edge("attention", layer, token, head, source)
    for kind, values in singles:
        score = float(values[sequence, token])
        if score >= cut:
            yield score, Edge(kind, layer, token, -1, token)
