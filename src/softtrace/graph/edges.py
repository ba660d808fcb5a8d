"""The graph of a sequence: nodes are the residual stream at (half-layer, token), edges add into it.

Everything else speaks these shapes. ``B`` sequences, ``H`` attention heads, ``T`` targets,
``S = T`` sources, ``L`` layers. Source: Kervadec et al., arXiv 2605.27033, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EdgeKind = Literal["attention", "attention_residual", "mlp", "mlp_residual"]
EDGE_KINDS: tuple[EdgeKind, ...] = ("attention", "attention_residual", "mlp", "mlp_residual")


class Edge(NamedTuple):
    """One edge. ``head`` is -1 where the kind has none; ``source == target`` but for attention."""

    kind: EdgeKind
    layer: int
    target: int
    head: int
    source: int


@dataclass(frozen=True)
class LayerEdges:
    """One number for every edge of one layer: an importance, a mask, a score or a closure value.

    Attributes:
        attention: ``[B, H, T, S]``, into the after-attention node of target t from source s.
        attention_residual: ``[B, T]``, the residual into the after-attention node.
        mlp: ``[B, T]``, the MLP's output into the after-MLP node.
        mlp_residual: ``[B, T]``, the residual into the after-MLP node.
        parallel: whether attention and MLP add into one node, as in a parallel-residual layer. Its
            residual is ``attention_residual``; ``mlp_residual`` does not exist and is 0.
    """

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor
    parallel: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerEdges:
        """Apply ``function`` to each of the four tensors."""
        return LayerEdges(
            function(self.attention),
            function(self.attention_residual),
            function(self.mlp),
            function(self.mlp_residual),
            self.parallel,
        )

    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The edges of which each token has one: attention residual, MLP, MLP residual."""
        return self.attention_residual, self.mlp, self.mlp_residual

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the four tensors in the order of :data:`EDGE_KINDS`."""
        yield self.attention
        yield self.attention_residual
        yield self.mlp
        yield self.mlp_residual


@dataclass(frozen=True)
class EdgeImportance:
    """Importances of all edges of a batch: shares of their node, in [0, 1], summing to 1.

    Attributes:
        layers: one :class:`LayerEdges` a layer, float32 (float64 for a float64 model). Absent edges
            (future, padding, outside a sliding window) and all edges into padding are exactly 0.
        visible: one ``[B, T, S]`` bool a layer (layers may share one tensor): True where an
            attention edge exists. An edge can exist with importance 0; it still counts in |E|.
        valid: ``[B, T]`` bool, False at padding.
    """

    layers: tuple[LayerEdges, ...]
    visible: tuple[Tensor, ...]
    valid: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(L, B, H, T)``."""
        batch, heads, length, _ = self.layers[0].attention.shape
        return len(self.layers), batch, heads, length

    def existing(self) -> tuple[LayerEdges, ...]:
        """Which edges exist, as bool :class:`LayerEdges` (attention expanded over heads)."""
        heads = self.layers[0].attention.shape[1]
        nowhere = torch.zeros_like(self.valid)
        return tuple(
            LayerEdges(
                seen[:, None].expand(-1, heads, -1, -1),
                self.valid,
                self.valid,
                nowhere if layer.parallel else self.valid,
                layer.parallel,
            )
            for layer, seen in zip(self.layers, self.visible, strict=True)
        )

    def detach(self) -> EdgeImportance:
        """The same importances as constants."""
        return EdgeImportance(
            tuple(layer.map(torch.Tensor.detach) for layer in self.layers), self.visible, self.valid
        )
