"""Identity 1: importances from norms, ‖A·V·W_O‖₁ = A·‖V·W_O‖₁, without a vector per edge.

Source: Kervadec et al., arXiv 2605.27033, section 3: an edge's importance is the L1 norm of what it
carries over the sum of those norms at its node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from softtrace.graph.attention_maps import (
    AttentionMap,
    MadeFrom,
    Rows,
    chunk_elements,
    each_block,
    on_device,
)
from softtrace.graph.edges import LayerEdges, RowwiseEdges

Norm = Literal["l1", "l2", "ifr"]
"""How large an edge is: a norm of what it carries, or by how much it brings the rest nearer to its
node (information flow routes, :mod:`softtrace.graph.proximity`)."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: norms, logs and softmax never run in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_value_norms(value: Tensor, weight: Tensor, order: int = 1) -> Tensor:
    """‖V[h, s] · W_O[h]‖ for every query head and source.

    Args:
        value: ``[B, H_kv, S, d_head]``, values as the attention uses them.
        weight: ``[H, d_head, d_model]``; H is a multiple of H_kv, and query head h reads value head
            ``h // (H / H_kv)`` (grouped-query attention).
        order: of the norm, 1 or 2.

    Returns:
        ``[B, H, S]`` in float32 (float64 for float64). The product ``[B, H, chunk, d_model]`` is
        taken in chunks over S; with gradients it is recomputed in the backward pass.
    """
    batch, kv_heads, length, head_dim = value.shape
    heads, _, width = weight.shape
    dtype = working_dtype(value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        value = value.to(dtype)
        grouped = weight.to(dtype).view(kv_heads, heads // kv_heads, head_dim, width)
        step = max(1, chunk_elements(value.device) // max(1, batch * heads * width))
        pieces = []
        for start in range(0, length, step):
            piece = value[:, :, start : start + step]
            if torch.is_grad_enabled() and (piece.requires_grad or grouped.requires_grad):
                norms = checkpoint(
                    _chunk_norms,
                    piece,
                    grouped,
                    order,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                norms = _chunk_norms(piece, grouped, order)
            pieces.append(norms)
        return torch.cat(pieces, dim=-1)


def _chunk_norms(value: Tensor, weight: Tensor, order: int) -> Tensor:
    """``[B, K, S, e] x [K, G, e, d] -> [B, K·G, S]``."""
    product = torch.einsum("bkse,kged->bkgsd", value, weight)
    return norm_of(product, order).flatten(1, 2)


def norm_of(vectors: Tensor, order: int = 1) -> Tensor:
    """L1 or L2 norm over the last dimension, in the working dtype."""
    # One kernel where abs and sum are two, and the cast a third.
    dtype = working_dtype(vectors.dtype)
    norms: Tensor = torch.linalg.vector_norm(vectors, ord=order, dim=-1, dtype=dtype)
    return norms


@dataclass(frozen=True)
class LayerNorms:
    """Norms of what the edges of one layer carry, or their proximities, float32 or float64.

    Attributes:
        attention: ``[B, H, T, S]``, 0 where there is no edge; a map of long sequences.
        entry: ``[B, T]``, the residual stream that enters the layer.
        mlp: ``[B, T]``, what the MLP adds.
        middle: ``[B, T]``, the residual stream after attention; None in a parallel layer, whose
            attention and MLP add into one node.
        sums: ``[B, T]``, over all attention edges of a target; None where they are not known yet.
    """

    attention: Tensor | AttentionMap
    entry: Tensor
    mlp: Tensor
    middle: Tensor | None
    sums: Tensor | None = None

    def to(self, device: torch.device) -> LayerNorms:
        """The same on a device: layers of a model may be on several, the graph is on one."""
        if self.entry.device == device:
            return self
        own = self.attention
        return LayerNorms(
            own.to(device) if isinstance(own, Tensor) else on_device(own, device),
            self.entry.to(device),
            self.mlp.to(device),
            None if self.middle is None else self.middle.to(device),
            None if self.sums is None else self.sums.to(device),
        )

    def attention_sums(self) -> Tensor:
        """``[B, T]``, over all attention edges of a target."""
        if self.sums is not None:
            return self.sums
        if isinstance(self.attention, Tensor):
            return self.attention.sum((1, 3))
        parts = each_block(self.attention, lambda norms, _: norms.sum((1, 3)))
        return torch.cat([part for _, part in parts], dim=1)


def carried_norms(probabilities: Tensor, norms: Tensor, scale: Tensor | None) -> Tensor:
    """Identity 1 for every attention edge, ``[B, H, T, S]``.

    Args:
        probabilities: ``[B, H, T, S]`` after the softmax, 0 where there is no edge.
        norms: ``[B, H, S]`` from :func:`head_value_norms`.
        scale: ``[B, T]`` >= 0, what every attention edge of a target is multiplied with (a norm
            after the projection, a residual multiplier); None for 1.
    """
    carried = probabilities.to(norms.dtype) * norms[:, :, None, :]
    return carried if scale is None else carried * scale.to(norms.dtype)[:, None, :, None]


def carried_map(
    probabilities: AttentionMap, visible: Tensor, norms: Tensor, scale: Tensor | None = None
) -> MadeFrom:
    """:func:`carried_norms`, to be made row by row.

    Args:
        probabilities: of the layer.
        visible: ``[B, T, S]`` bool, True where an edge exists.
        norms, scale: see :func:`carried_norms`.
    """

    def carried(values: Tensor, rows: Rows) -> Tensor:
        own = None if scale is None else rows.of(scale)
        found = carried_norms(values, norms[..., : rows.end], own)
        return found.mul_(rows.edges_of(visible)[:, None])

    return MadeFrom(probabilities, carried)


class SummedMap(AttentionMap):
    """Attention probabilities of which the carried norms are summed as rows are made for the run.

    So importances need them no second time. Rows are made once each, and without gradients.

    Args:
        probabilities: of the layer.
        visible: ``[B, T, S]`` bool, True where an edge exists.
        norms: ``[B, H, S]`` from :func:`head_value_norms`.

    Attributes:
        sums: ``[B, T]``, of the rows that were made.
    """

    def __init__(self, probabilities: AttentionMap, visible: Tensor, norms: Tensor) -> None:
        self.probabilities, self.carried = probabilities, carried_map(probabilities, visible, norms)
        self.shape, self.device = probabilities.shape, probabilities.device
        self.sums = norms.new_zeros(self.shape[0], self.shape[2])

    @override
    def rows(self, rows: Rows) -> Tensor:
        values = self.probabilities.rows(rows)
        carried = self.carried.rows_from(self.probabilities, values, rows)
        rows.place(self.sums, carried.sum((1, 3)))
        return values


def edge_shares(layers: list[LayerNorms], valid: Tensor) -> tuple[LayerEdges, ...]:
    """Every edge's share of its node; 0 where the node is zero, and at padding.

    Args:
        layers: one a layer; taken apart as it is read, so that no two maps of a layer exist.
        valid: ``[B, T]`` bool, False at padding.
    """
    # One number a token, of all layers at once: on a GPU each operation is a launch.
    sums = torch.stack([layer.attention_sums() for layer in layers])
    tiny = torch.finfo(sums.dtype).tiny
    nought = torch.zeros_like(sums[0])
    parallel = [layer.middle is None for layer in layers]
    entry, mlp, middle = (
        torch.stack(of) * valid
        for of in (
            [layer.entry for layer in layers],
            [layer.mlp for layer in layers],
            [nought if layer.middle is None else layer.middle for layer in layers],
        )
    )
    beside = entry
    if any(parallel):
        into = [each if one else nought for each, one in zip(mlp, parallel, strict=True)]
        beside = entry + torch.stack(into)
    total, later = (beside + sums).clamp_min(tiny), (middle + mlp).clamp_min(tiny)
    ends = [a if one else b for a, b, one in zip(total, later, parallel, strict=True)]
    shares = (entry / total, mlp / torch.stack(ends), middle / later)
    found = []
    for residual, of_mlp, of_middle, node in zip(*shares, total, strict=True):
        layer = layers.pop(0)
        own, one_node = layer.attention, layer.middle is None
        if isinstance(own, Tensor):
            node = node[:, None, :, None]
            attention = own / node if own.requires_grad else own.div_(node)
            found.append(LayerEdges(attention, residual, of_mlp, of_middle, one_node))
        else:
            found.append(
                RowwiseEdges(MadeFrom(own, _share_of(node)), residual, of_mlp, of_middle, one_node)
            )
    return tuple(found)


def _share_of(node: Tensor) -> Callable[[Tensor, Rows], Tensor]:
    """A function that divides rows of norms by the sums of their nodes, ``[B, T]``."""
    return lambda norms, rows: norms / rows.of(node)[:, None, :, None]
