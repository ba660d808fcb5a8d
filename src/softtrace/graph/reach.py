"""The traces of single positions, out of masks that serve all positions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import one_hot

from softtrace.graph.edges import LayerEdges


def traces_of(
    masks: Sequence[LayerEdges], rows: Tensor, positions: Tensor
) -> tuple[LayerEdges, ...]:
    """Of the kept edges only those that reach one position each, through kept edges.

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
        own = layer.map(lambda part: part.index_select(0, rows))
        mlp, mlp_residual = own.mlp & reached, own.mlp_residual & reached
        # In a parallel layer the MLP reads the node that enters the layer, not one in the middle.
        middle = reached if layer.parallel else mlp | mlp_residual
        attention = own.attention & middle[:, None, :, None]
        residual = own.attention_residual & middle
        reached = attention.any(2).any(1) | residual
        if layer.parallel:
            reached = reached | mlp
        found.append(replace(own, attention=attention, attention_residual=residual, mlp=mlp,
                             mlp_residual=mlp_residual))  # fmt: skip
    return tuple(reversed(found))


def rows_at_once(masks: Sequence[LayerEdges], elements: int) -> int:
    """How many sequences' masks have at most so many elements together; at least 1.

    Args:
        masks: of the batch.
        elements: of one layer's largest map times the layers.
    """
    return max(1, elements // (len(masks) * masks[0].attention[0].numel()))
