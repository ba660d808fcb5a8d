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
from typing_extensions import override

from softtrace.graph.attention_maps import AttentionMap, EveryEdge, HeldMap, MadeFrom, as_map

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
        parallel: Whether attention and MLP add into one node, as in a parallel-residual layer. Its
            residual is ``attention_residual``; ``mlp_residual`` does not exist and is 0.
    """

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor
    parallel: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerEdges:
        """Apply ``function`` to each of the four tensors."""
        attention, residual, mlp, mlp_residual = map(function, self)
        return LayerEdges(attention, residual, mlp, mlp_residual, self.parallel)

    @property
    def shape(self) -> torch.Size:
        """``[B, H, T, S]`` of the attention edges."""
        return self.attention.shape

    @property
    def attention_map(self) -> AttentionMap:
        """The attention edges, of which some rows can be made at a time."""
        return HeldMap(self.attention)

    def with_attention(self, attention: Tensor | AttentionMap) -> LayerEdges:
        """The same with other attention edges."""
        if isinstance(attention, Tensor):
            return LayerEdges(attention, *self.nodes(), parallel=self.parallel)
        return RowwiseEdges(attention, *self.nodes(), parallel=self.parallel)

    def detach(self) -> LayerEdges:
        """The same numbers as constants."""
        return self.map(Tensor.detach)

    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The edges of which each token has one: attention residual, MLP, MLP residual."""
        return self.attention_residual, self.mlp, self.mlp_residual

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the four tensors in the order of :data:`EDGE_KINDS`."""
        yield self.attention
        yield from self.nodes()


class RowwiseEdges(LayerEdges):
    """The same of sequences so long that the attention edges of all layers would not fit.

    ``attention`` is made when it is asked for, each time anew: ask for one layer at a time.

    Args:
        attention: which can make its rows.
        attention_residual, mlp, mlp_residual, parallel: see :class:`LayerEdges`.
    """

    def __init__(
        self,
        attention: Tensor | AttentionMap,
        attention_residual: Tensor,
        mlp: Tensor,
        mlp_residual: Tensor,
        parallel: bool = False,
    ) -> None:
        vars(self).update(  # it is frozen
            _map=as_map(attention),
            attention_residual=attention_residual,
            mlp=mlp,
            mlp_residual=mlp_residual,
            parallel=parallel,
        )

    @property
    def attention(self) -> Tensor:
        """``[B, H, T, S]``, made anew."""
        return self.attention_map.whole()

    @property
    @override
    def shape(self) -> torch.Size:
        return self.attention_map.shape

    @property
    @override
    def attention_map(self) -> AttentionMap:
        found: AttentionMap = vars(self)["_map"]
        return found

    def held(self) -> LayerEdges:
        """The same with attention edges that are made at one go."""
        return LayerEdges(self.attention, *self.nodes(), parallel=self.parallel)

    @override
    def detach(self) -> LayerEdges:
        constant = MadeFrom(self.attention_map, lambda values, _: values.detach())
        residual, mlp, mlp_residual = (part.detach() for part in self.nodes())
        return RowwiseEdges(constant, residual, mlp, mlp_residual, self.parallel)


@dataclass(frozen=True)
class EdgeImportance:
    """Importances of all edges of a batch: shares of their node, in [0, 1], summing to 1.

    Attributes:
        layers: One :class:`LayerEdges` a layer, float32 (float64 for a float64 model); of long
            sequences :class:`RowwiseEdges`. Absent edges
            (future, padding, outside a sliding window) and all edges into padding are exactly 0.
        visible: One ``[B, T, S]`` bool a layer (layers may share one tensor): True where an
            attention edge exists. An edge can exist with importance 0; it still counts in |E|.
        valid: ``[B, T]`` bool, False at padding.
    """

    layers: tuple[LayerEdges, ...]
    visible: tuple[Tensor, ...]
    valid: Tensor

    def __repr__(self) -> str:  # of long texts all numbers would be made anew to be shown
        layers, batch, heads, length = self.shape
        return f"EdgeImportance({layers} layers of {heads} heads, {batch} x {length} tokens)"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(L, B, H, T)``."""
        batch, heads, length, _ = self.layers[0].shape
        return len(self.layers), batch, heads, length

    def existing(self) -> tuple[LayerEdges, ...]:
        """Which edges exist, as bool :class:`LayerEdges` (attention expanded over heads)."""
        heads = self.layers[0].shape[1]
        nowhere = torch.zeros_like(self.valid)
        found = []
        for layer, seen in zip(self.layers, self.visible, strict=True):
            beside = nowhere if layer.parallel else self.valid
            expanded = seen[:, None].expand(-1, heads, -1, -1)
            nodes = LayerEdges(expanded, self.valid, self.valid, beside, layer.parallel)
            rowwise = isinstance(layer, RowwiseEdges)
            found.append(nodes.with_attention(EveryEdge(seen, heads)) if rowwise else nodes)
        return tuple(found)

    def detach(self) -> EdgeImportance:
        """The same importances as constants."""
        layers = (layer.detach() for layer in self.layers)
        return EdgeImportance(tuple(layers), self.visible, self.valid)
