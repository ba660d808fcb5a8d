"""The traces of single positions, out of masks that serve all positions at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from softtrace.graph.attention_maps import AttentionMap, MadeFrom, Rows, each_block
from softtrace.graph.edges import LayerEdges, RowwiseEdges

_MASK_ELEMENTS = 1 << 28  # of the attention masks of one batch, a byte each


def traces_of(
    masks: Sequence[LayerEdges], rows: Tensor, positions: Tensor
) -> tuple[LayerEdges, ...]:
    """The kept edges that reach a position through kept edges, for each of N positions.

    One backward sweep over the layers, as :func:`softtrace.graph.sizes.edge_counts` makes for
    numbers of edges.

    Args:
        masks: per layer, bool ``[B, H, T, S]`` and ``[B, T]``.
        rows: ``[N]`` int64, the sequence of each position.
        positions: ``[N]`` int64, in [0, T).

    Returns:
        Masks of N sequences.
    """
    reached = one_hot(positions, masks[0].mlp.shape[1]).bool()
    found: list[LayerEdges] = []
    for layer in reversed(masks):
        residual, mlp, mlp_residual = (part.index_select(0, rows) for part in layer.nodes())
        mlp, mlp_residual = mlp & reached, mlp_residual & reached
        # In a parallel layer the MLP reads the node that enters the layer, not one in the middle.
        middle = reached if layer.parallel else mlp | mlp_residual
        residual = residual & middle
        attention = _into(layer.attention_map, rows, middle)
        reached = residual | mlp if layer.parallel else residual.clone()
        for block, kept in each_block(attention, lambda values, _: values.any(2).any(1)):
            reached[:, : block.end] |= kept
        nodes = LayerEdges(middle, residual, mlp, mlp_residual, layer.parallel)
        rowwise = isinstance(layer, RowwiseEdges)
        found.append(nodes.with_attention(attention if rowwise else attention.whole()))
    return tuple(reversed(found))


def _into(attention: AttentionMap, sequences: Tensor, targets: Tensor) -> AttentionMap:
    """The kept edges of N sequences that lead into chosen targets, ``[N, T]`` bool."""

    def chosen(kept: Tensor, rows: Rows) -> Tensor:
        return kept.index_select(0, sequences) & rows.of(targets)[:, None, :, None]

    found = MadeFrom(attention, chosen)
    found.shape = torch.Size((len(sequences), *attention.shape[1:]))
    return found.hold() if attention.held else found


def rows_at_once(layers: Sequence[LayerEdges]) -> int:
    """How many sequences are run at a time, each under masks like these of its own; at least 1."""
    return max(1, _MASK_ELEMENTS // (len(layers) * layers[0].shape[1:].numel()))
