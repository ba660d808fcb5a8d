"""Masked runs: every edge times its mask.

Where a masked run takes its attention probabilities from is a choice with a name
(:data:`AttentionKind`). With those ``"recorded"`` in the full run one masked run serves every
position exactly: an edge is A·V·W_O with the full model's A, so masking elsewhere cannot reach a
position through the softmax's denominator, to which the keys of all visible tokens contribute, also
of tokens whose edges are all absent. ``"recomputed"`` ones are those of the masked states, which a
masked model really computes, and which the hooks of the authors of arXiv 2605.27033 give. With
``"kept"`` they are recomputed too and no attention edge is masked, as in the authors' released
model files, whose mask never reaches the attention function.

Adding (mask - 1)·residual to a sub-block's output turns ``residual + output`` into
``mask·residual + output``, so residual edges are masked without touching the model's forward. Where
the output is multiplied by a constant before the sum, what is added is divided by it. Then, and in
half precision, the sum rounds: a node none of whose edges is kept is not zero but rounding error,
which a norm blows up. There the node is computed exactly beside the model's own sum, and put in its
place where it is read: at the input of the MLP's norm and at the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.anatomy.anatomy import Anatomy
from softtrace.checks import check_choice
from softtrace.graph.attention_maps import (
    AttentionMap,
    EveryEdge,
    MadeFrom,
    Rows,
    as_map,
    on_device,
)
from softtrace.graph.batch import Batch
from softtrace.graph.edges import LayerEdges, RowwiseEdges
from softtrace.model.hooks import Hook, on_output
from softtrace.tracing.run import DeepEnough, Run
from softtrace.tracing.skipping import KeptRows, Unread, kept_rows

AttentionKind = Literal["recorded", "recomputed", "kept"]
"""Where a masked run takes its attention probabilities from (see the module's notes)."""


def check_attention(attention: str) -> None:
    """Raise :class:`InvalidInputError` for an unknown :data:`AttentionKind`."""
    check_choice("attention", attention, get_args(AttentionKind))


def with_attention_kept(
    masks: Sequence[LayerEdges], visible: Sequence[Tensor]
) -> tuple[LayerEdges, ...]:
    """The masks with every attention edge that exists left in, for ``"kept"``.

    Args:
        masks: per layer.
        visible: ``[B, T, S]`` bool a layer, which attention edges exist.
    """
    heads = masks[0].shape[1]
    return tuple(
        layer.with_attention(
            EveryEdge(seen, heads)
            if isinstance(layer, RowwiseEdges)
            else seen[:, None].expand(-1, heads, -1, -1)
        )
        for layer, seen in zip(masks, visible, strict=True)
    )


class MaskedMap(AttentionMap):
    """Attention probabilities times their mask.

    Args:
        probabilities: of all edges.
        mask: of numbers in [0, 1], or bool.
    """

    def __init__(self, probabilities: AttentionMap, mask: AttentionMap) -> None:
        self.probabilities, self.mask = probabilities, mask
        self.shape, self.device = probabilities.shape, probabilities.device
        self.targets = mask.targets

    @override
    def rows(self, rows: Rows) -> Tensor:
        values = self.probabilities.rows(rows)
        if isinstance(self.mask, MadeFrom) and self.mask.is_made_from(self.probabilities):
            mask = self.mask.rows_from(self.probabilities, values, rows)  # one softmax for both
        else:
            mask = self.mask.rows(rows)
        return values * mask  # of a bool mask too: on a CPU torch.where takes up to thrice as long


class MaskedRun(Run):
    """Multiplies every edge by its mask; attention is not renormalised."""

    own_sums = False  # whether the model's own sums are right even where nobody reads them

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor | AttentionMap] | None = None,
        keep_hidden: bool = False,
        exact: bool = False,
        stop: int | None = None,
        static: bool = False,
    ) -> None:
        super().__init__(anatomy, batch, keep_hidden)
        self.masks = masks
        self.recorded = attention
        self.reads_visible = attention is None
        self.exact = exact
        self.stop = stop
        self.static = static
        self._node: Tensor | None = None
        self._cast: tuple[Tensor, ...] | None = None

    @override
    def listeners(self) -> list[Hook]:
        hooks = super().listeners()
        for index, modules in enumerate(self.anatomy.layers):
            hooks.append(Hook(modules.layer, on_output(partial(self._leave, index)), False))
        return hooks

    @override
    def hooks(self) -> list[Hook]:
        hooks = self.listeners()
        if not self.static:  # how many rows are kept is read from the device
            kept = kept_rows([masks.mlp for masks in self.masks])
            for modules, rows in zip(self.anatomy.layers, kept, strict=True):
                for module in modules.token_wise:
                    hooks += KeptRows(module, rows).hooks()
        if self.recorded is not None:
            for modules in self.anatomy.layers:
                for projection in modules.score_projections:
                    hooks += Unread(projection).hooks()
        return hooks

    @override
    def _enter(self, hidden: Tensor) -> Tensor | None:
        super()._enter(hidden)
        if self.stop is not None and len(self.hidden or ()) > self.stop:
            raise DeepEnough
        return None

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        layer = self.layer_of(module)
        mask = on_device(self.masks[layer].attention_map, value.device)
        if self.recorded is not None:
            probabilities = on_device(as_map(self.recorded[layer]), value.device)
        elif mask.held:
            probabilities = probabilities.hold()
        masked = MaskedMap(probabilities, mask)
        return masked.hold() if mask.held and probabilities.held else masked

    def _rounds(self, layer: int) -> bool:
        """Whether the model's own sums round where an edge is masked (see the module's notes)."""
        modules = self.anatomy.layers[layer]
        scaled = modules.attention_scale != 1 or modules.mlp_scale != 1
        half = self.entry.dtype.itemsize < 4
        return self.exact or scaled or half or torch.is_autocast_enabled(self.entry.device.type)

    def _gates(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:
        """``[B, T, 1]`` masks of the attention residual, the MLP and the MLP residual."""
        known = None if self._cast is None else self._cast[0]
        if known is None or (known.dtype, known.device) != (like.dtype, like.device):
            # Of all layers at once: on a GPU each operation is a launch.
            nodes = torch.stack([part for masks in self.masks for part in masks.nodes()])
            self._cast = nodes.to(like)[..., None].unbind()
        assert self._cast is not None
        return self._cast[3 * layer : 3 * layer + 3]

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        gate, scale = self._gates(layer, output)[0], self.anatomy.layers[layer].attention_scale
        if self._rounds(layer):
            self._add(gate * self.entry + (output if scale == 1 else scale * output))
            if not self.own_sums:
                return output
        return torch.addcmul(output, gate - 1, self.entry, value=1 / scale)

    @override
    def _reach_middle(self, hidden: Tensor) -> Tensor | None:
        if self._node is None:
            return super()._reach_middle(hidden)
        if self._middle is None:
            self._middle = self._node
        return self.middle.reshape(hidden.shape)

    @override
    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        modules, (_, gate, beside) = self.anatomy.layers[layer], self._gates(layer, output)
        scale = modules.mlp_scale
        kept = gate * output
        first = part == 0 and not modules.parallel
        rounds = self._rounds(layer)
        if rounds:
            if first:
                self._node = beside * self.middle
            self._add(kept if scale == 1 else scale * kept)
        if not first or (rounds and not self.own_sums):
            return kept
        return torch.addcmul(kept, beside - 1, self.middle, value=1 / scale)

    def _add(self, part: Tensor) -> None:
        self._node = part if self._node is None else self._node + part

    def _leave(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        node, self._node = self._node, None
        return output if node is None else node.to(output.dtype)
