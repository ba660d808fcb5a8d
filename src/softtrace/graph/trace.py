"""Identities 2 and 4: traces as a bottleneck closure, and their sizes from reachability.

Source: Kervadec et al., arXiv 2605.27033, section 3: the s-Trace is found by best-first search
backwards from the output node.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrace.errors import InvalidInputError
from softtrace.graph.batch import check_range
from softtrace.graph.edges import Edge, EdgeImportance, EdgeKind, LayerEdges
from softtrace.graph.importance import chunk_elements

_UNREACHED = -1.0  # below every importance, so that (max, min) keeps unreached nodes out


def edge_counts(masks: Sequence[LayerEdges]) -> Tensor:
    """How many masked edges of each layer and kind reach the output node of every position.

    One backward sweep (identity 4): a ``[T_out, T]`` reachability is propagated through the edges,
    times in-degrees. With masks of 0 and 1 the counts are exact; with soft masks they are the soft
    size, differentiable, where the union over paths and heads is a sum clamped at 1 (equal to "or"
    for 0 and 1, and cheap: one matrix product a layer).

    Args:
        masks: per layer, bool or floating ``[B, H, T, S]`` and ``[B, T]``; 0 at absent edges.

    Returns:
        ``[B, T, L, 4]`` edges by layer and kind (order of :data:`EDGE_KINDS`); for bool masks in
        float64.
    """
    first = masks[0].attention
    soft = first.is_floating_point()
    batch, heads, length, _ = first.shape
    dtype = first.dtype if soft else torch.float32
    wide = dtype if soft or _products_exact(heads * length**2, first.device) else torch.float64
    reach = torch.eye(length, dtype=dtype, device=first.device).expand(batch, -1, -1)
    # On a GPU each operation is a launch: several layers at once, fewer where they are large.
    together = max(1, chunk_elements(first) // (batch * length**2))
    counted: list[Tensor] = []
    with torch.autocast(first.device.type, enabled=False):
        for end in range(len(masks), 0, -together):
            counts, reach = _counts_of(masks[max(0, end - together) : end], reach, wide)
            counted.insert(0, counts)
        stacked = torch.cat(counted).permute(1, 2, 0, 3)
    return stacked if soft or first.device.type == "mps" else stacked.double()


def _counts_of(
    masks: Sequence[LayerEdges], reach: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``[L, B, T, 4]`` counts in neighbouring layers, and who reaches the nodes before them.

    Args:
        masks: of these layers.
        reach: ``[B, T_out, T]``, how far each node after them reaches each output node.
        wide: dtype in which counts are exact.
    """
    parallel = [layer.parallel for layer in masks]
    nodes = torch.stack([part for layer in masks for part in layer.nodes()]).to(reach.dtype)
    residual, mlp, mlp_residual = nodes.view(-1, 3, *nodes.shape[1:]).unbind(1)
    through_mlp = (mlp + mlp_residual).clamp(max=1)[:, :, None]
    into = residual
    if any(parallel):  # there the MLP reads the node that enters the layer
        both = (residual + mlp).unbind()
        into = torch.stack(
            [a if one else b for a, b, one in zip(both, residual, parallel, strict=True)]
        )
    over_heads = torch.stack([layer.attention.sum(1, dtype=reach.dtype) for layer in masks])
    steps = (over_heads.clamp(max=1) + torch.diag_embed(into)).clamp(max=1).unbind()
    at_nodes, at_attention = [], []
    for index in reversed(range(len(masks))):
        at_nodes.append(reach)
        if not parallel[index]:
            reach = reach * through_mlp[index]
        at_attention.append(reach)
        reach = (reach @ steps[index]).clamp(max=1)
    sides = ((at_attention, (over_heads.sum(-1), residual)), (at_nodes, (mlp, mlp_residual)))
    counts = [
        torch.stack(at[::-1]).to(wide) @ torch.stack(edges, dim=-1).to(wide) for at, edges in sides
    ]
    return torch.cat(counts, dim=-1), reach


def _products_exact(largest: int, device: torch.device) -> bool:
    """Whether float32 matrix products of counts up to this are exact: they stop at 2^24.

    TF32 and the like, which users switch on for speed, stop well before.
    """
    if device.type == "mps":  # has no float64
        return True
    if largest >= 1 << 24:
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # what PyTorch raises where fp32_precision of a backend was set instead
        return False


def total_edges(importance: EdgeImportance) -> Tensor:
    """|E| of every position, ``[B, T]`` int64: existing edges that can reach its output node.

    What :func:`edge_counts` gives for the existing edges, in a third of its operations: a token's
    nodes all exist, so one reachability serves both nodes of a layer.
    """
    _, batch, heads, length = importance.shape
    device = importance.valid.device
    exact = _products_exact(heads * length**2, device)
    wide = torch.float32 if exact else torch.float64
    reach = torch.eye(length, dtype=torch.float32, device=device).expand(batch, -1, -1)
    summed = torch.float32 if device.type == "mps" else torch.float64
    count = torch.zeros(batch, length, dtype=summed, device=device)
    known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}  # layers of one window share one
    with torch.autocast(device.type, enabled=False):
        for layer, seen in zip(
            reversed(importance.layers), reversed(importance.visible), strict=True
        ):
            kind = (id(seen), layer.parallel)
            if kind not in known:
                step = (seen | torch.diag_embed(importance.valid)).float()
                others = importance.valid * (2 if layer.parallel else 3)
                known[kind] = step, (heads * seen.sum(-1, dtype=wide) + others)[..., None]
            step, degrees = known[kind]
            count = count + (reach.to(wide) @ degrees)[..., 0]
            reach = (reach @ step).clamp(max=1)
    return (count * importance.valid).round().long()


def soft_size(
    importance: EdgeImportance, masks: Sequence[LayerEdges], weights: Tensor | None = None
) -> Tensor:
    """Size of the traces that masks leave, as shares of |E|: soft reachability times in-degree.

    Args:
        importance: of the batch, for |E|.
        masks: see :mod:`softtrace.graph.masks`.
        weights: ``[B, T]`` to sum with; None returns every position.

    Returns:
        ``[B, T]`` (0 at padding), or a scalar with ``weights``.
    """
    with torch.autocast(importance.valid.device.type, enabled=False):
        counts = edge_counts(masks).sum((2, 3))
        size = counts / total_edges(importance).clamp_min(1) * importance.valid
        return size if weights is None else (size * weights).sum()


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
            for score, edge in _edges_into(importance, sequence, *frontier.pop(), cut):
                # The running number keeps the order of equal importances fixed.
                heapq.heappush(heap, (-score, pushed, edge))
                pushed += 1
        negative, _, edge = heapq.heappop(heap)
        yield edge, -negative
        node = _origin(importance, edge)
        if node is not None and node not in reached:
            reached.add(node)
            frontier.append(node)


def _origin(importance: EdgeImportance, edge: Edge) -> tuple[int, bool, int] | None:
    """The node an edge starts from as (layer, after its MLP?, token); None for the embedding."""
    if edge.kind in ("mlp", "mlp_residual") and not importance.layers[edge.layer].parallel:
        return edge.layer, False, edge.target
    return None if edge.layer == 0 else (edge.layer - 1, True, edge.source)


def _edges_into(
    importance: EdgeImportance, sequence: int, layer: int, after_mlp: bool, token: int, cut: float
) -> Iterator[tuple[float, Edge]]:
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
