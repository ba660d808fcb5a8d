"""Identity 4: sizes of the traces of all positions at once, from reachability."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softtrace.graph.attention_maps import chunk_elements
from softtrace.graph.edges import EdgeImportance, LayerEdges, RowwiseEdges
from softtrace.graph.rowwise_sizes import from_outputs, products, summed_heads, traces_at


def edge_counts(masks: Sequence[LayerEdges], places: Tensor | None = None) -> Tensor:
    """How many masked edges of each layer and kind reach the output node of every position.

    One backward sweep: a ``[T_out, T]`` reachability is propagated through the edges,
    times in-degrees. With masks of 0 and 1 the counts are exact; with soft masks they are the soft
    size, differentiable, where the union over paths and heads is a sum clamped at 1 (equal to "or"
    for 0 and 1, and cheap: one matrix product a layer).

    Args:
        masks: per layer, bool or floating ``[B, H, T, S]`` and ``[B, T]``; 0 at absent edges.
        places: ``[B, n]`` int64, positions; the result is then ``[B, n, L, 4]``. None for all.

    Returns:
        ``[B, T, L, 4]`` edges by layer and kind (order of
        :data:`softtrace.graph.edges.EDGE_KINDS`); for bool masks in float64.
    """
    if isinstance(masks[0], RowwiseEdges):
        return traces_at(masks, places)[0]
    return _swept(masks, places, who=False)[0]


def held_traces_at(
    masks: Sequence[LayerEdges], places: Tensor | None = None
) -> tuple[Tensor, tuple[LayerEdges, ...]]:
    """``edge_counts`` of chosen positions, and the masks of what reaches any of them.

    As :func:`softtrace.graph.rowwise_sizes.traces_at` gives them, but attention edges are left in
    that no position needs: which rows those are would have to be asked of a GPU in every layer, and
    of maps that are held it takes longer to pick some rows than to use all.

    Args:
        masks: per layer, bool ``[B, H, T, S]`` and ``[B, T]``, held.
        places: ``[B, n]`` int64, positions; None for all.
    """
    counts, reached = _swept(masks, places, who=True)
    needed = []
    for layer, (middle, end) in zip(masks, reached, strict=True):
        residual, mlp, mlp_residual = layer.nodes()
        nodes = residual & middle, mlp & end, mlp_residual & end
        needed.append(LayerEdges(layer.attention, *nodes, layer.parallel))
    return counts, tuple(needed)


def _swept(
    masks: Sequence[LayerEdges], places: Tensor | None, who: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Counts as :func:`edge_counts` gives them of masks that are held; if that is asked for, per
    layer ``[B, T]`` bool, which nodes after attention and after the MLP reach any position."""
    first = masks[0].attention
    soft = first.is_floating_point()
    batch, heads, length, _ = first.shape
    dtype = first.dtype if soft else torch.float32
    wide = dtype if soft or _products_exact(heads * length**2, first.device) else torch.float64
    reach = from_outputs(batch, length, places, first.device).to(dtype)
    # On a GPU each operation is a launch: several layers at once, fewer where they are large. On a
    # CPU so few that what one operation makes of them is in a core's own cache for the next.
    most = chunk_elements(first.device) >> (4 if first.device.type == "cpu" else 0)
    together = max(1, most // (batch * length**2))
    counted: list[Tensor] = []
    reached: list[tuple[Tensor, Tensor]] = []
    with torch.autocast(first.device.type, enabled=False):
        for end in range(len(masks), 0, -together):
            part = masks[max(0, end - together) : end]
            counts, reach, nodes = _counts_of(part, reach, wide, who)
            counted.insert(0, counts)
            reached[:0] = nodes
        stacked = torch.cat(counted).permute(1, 2, 0, 3)
    return (stacked if soft or first.device.type == "mps" else stacked.double()), reached


def _counts_of(
    masks: Sequence[LayerEdges], reach: Tensor, wide: torch.dtype, who: bool
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """``[L, B, T, 4]`` counts in neighbouring layers, who reaches the nodes before them, and per
    layer, if that is asked for, ``[B, T]`` bool, who is reached, after attention and at its end.

    Args:
        masks: of these layers.
        reach: ``[B, T_out, T]``, how far each node after them reaches each output node.
        wide: dtype in which counts are exact.
        who: whether it is asked who is reached.
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
    over_heads = torch.stack([summed_heads(layer.attention, reach.dtype) for layer in masks])
    steps = (over_heads + torch.diag_embed(into)).clamp(max=1).unbind()
    at_nodes, at_attention = [], []
    for index in reversed(range(len(masks))):
        at_nodes.append(reach)
        if not parallel[index]:
            reach = reach * through_mlp[index]
        at_attention.append(reach)
        reach = (reach @ steps[index]).clamp(max=1)
    sides = [torch.stack(at[::-1]) for at in (at_attention, at_nodes)]
    edges = ((over_heads.sum(-1), residual), (mlp, mlp_residual))
    counts = [
        at.to(wide) @ torch.stack(own, dim=-1).to(wide)
        for at, own in zip(sides, edges, strict=True)
    ]
    found = [at.amax(2) > 0 for at in sides] if who else []
    return torch.cat(counts, dim=-1), reach, list(zip(*found, strict=True))


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


def total_edges(importance: EdgeImportance, places: Tensor | None = None) -> Tensor:
    """|E| of every position, ``[B, T]`` int64: existing edges that can reach its output node.

    What :func:`edge_counts` gives for the existing edges, in a third of its operations: a token's
    nodes all exist, so one reachability serves both nodes of a layer.

    Args:
        importance: of the batch.
        places: ``[B, n]`` int64, positions; the result is then ``[B, n]``. None for all.
    """
    _, batch, heads, length = importance.shape
    valid = importance.valid
    reach = from_outputs(batch, length, places, valid.device)
    small = batch * length**2 <= chunk_elements(valid.device)
    exact = _products_exact(heads * length**2, valid.device)
    wide = torch.float32 if exact else torch.float64
    count: Tensor | None = None
    summed = torch.float32 if valid.device.type == "mps" else torch.float64
    known: dict[tuple[int, bool], tuple[Tensor | None, Tensor]] = {}  # of layers of one window
    settled: set[int] = set()  # windows that let no more tokens in
    with torch.autocast(valid.device.type, enabled=False):
        for layer, seen in zip(
            reversed(importance.layers), reversed(importance.visible), strict=True
        ):
            kind = (id(seen), layer.parallel)
            if kind not in known:
                step = (seen | torch.diag_embed(valid)).float() if small else None
                others = valid * (2 if layer.parallel else 3)
                known[kind] = step, heads * _sources(seen).to(wide) + others
            step, degrees = known[kind]
            if step is None:
                own = products(reach, (degrees,))[..., 0]
            else:
                own = (reach.to(wide) @ degrees[..., None])[..., 0]
            count = own.to(summed) if count is None else count + own
            if step is not None:
                reach = (reach @ step).clamp(max=1)
            elif id(seen) not in settled:
                before, reach = reach, _stepped(reach, seen, valid)
                if torch.equal(before, reach):
                    settled.add(id(seen))
                else:
                    settled.clear()
    assert count is not None
    own_valid = valid if places is None else valid.gather(1, places.to(valid.device))
    return (count * own_valid).long()


def _sources(seen: Tensor) -> Tensor:
    """``[B, T]`` float32, how many sources each target of ``[B, T, S]`` sees.

    In blocks: a sum of bytes casts all of them before it adds them up, to four times their memory.
    """
    step = max(1, chunk_elements(seen.device) // (len(seen) * seen.shape[2]))
    parts = torch.split(seen, step, dim=1)
    return torch.cat([part.sum(-1, dtype=torch.float32) for part in parts], dim=1)


def _stepped(reach: Tensor, seen: Tensor, valid: Tensor) -> Tensor:
    """Who reaches the nodes one layer before, in blocks of ``seen`` ``[B, T, S]``."""
    found = reach * valid[:, None]
    step = max(1, chunk_elements(seen.device) // (len(seen) * seen.shape[2]))
    for start in range(0, seen.shape[1], step):
        part = slice(start, start + step)
        found += reach[..., part] @ seen[:, part].float()
    return found.clamp_(max=1)


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
