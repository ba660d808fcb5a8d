"""The two kinds of run: one records importances, the other masks edges. Hooks, no model code.

A masked run can use the attention probabilities of the recording run or compute its own. Recorded
ones make identity 3 exact: an edge is A·V·W_O with the full model's A, so masking elsewhere cannot
reach a position through the softmax's denominator, to which the keys of all visible tokens
contribute, also of tokens whose edges are all absent.

Identity 5: adding (mask - 1)·residual to a sub-block's output turns ``residual + output`` into
``mask·residual + output``, so residual edges are masked without touching the model's forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.families import Anatomy
from softtrace.graph import LayerEdges
from softtrace.hooks import Hook, on_input, on_output
from softtrace.importance import (
    attention_shares,
    head_value_norms,
    l1_norm,
    share_of_node,
    working_dtype,
)
from softtrace.rows import KeptRows, Unread


class Run:
    """Follows one forward through the layers; subclasses record or mask at each half-layer.

    Attributes:
        valid: ``[B, T]`` bool, False at padding.
        hidden: with ``keep_hidden``, the residual stream entering each layer and the final norm.
    """

    def __init__(self, anatomy: Anatomy, valid: Tensor, keep_hidden: bool = False) -> None:
        self.anatomy = anatomy
        self.valid = valid
        self.hidden: list[Tensor] | None = [] if keep_hidden else None
        self._index = {id(modules.attention): i for i, modules in enumerate(anatomy.layers)}
        self._entry: Tensor | None = None
        self._middle: Tensor | None = None

    def hooks(self) -> list[Hook]:
        """Everything to register around the forward."""
        hooks: list[Hook] = []
        for index, modules in enumerate(self.anatomy.layers):
            hooks += [
                Hook(modules.layer, on_input(self._enter), True),
                Hook(modules.attention, on_output(self.after_attention, index), False),
                Hook(modules.mlp_norm, on_input(self._reach_middle), True),
                Hook(modules.mlp, on_output(self.after_mlp, index), False),
            ]
        if self.hidden is not None:
            hooks.append(Hook(self.anatomy.final_norm, on_input(self.hidden.append), True))
        return hooks

    @property
    def entry(self) -> Tensor:
        """The residual stream that entered the current layer, ``[B, T, d_model]``."""
        if self._entry is None:
            raise RuntimeError("a sub-block ran before its layer was entered")
        return self._entry

    @property
    def middle(self) -> Tensor:
        """The residual stream after the current layer's attention, ``[B, T, d_model]``."""
        if self._middle is None:
            raise RuntimeError("the MLP ran before its norm")
        return self._middle

    def _enter(self, hidden: Tensor) -> None:
        self._entry = hidden
        if self.hidden is not None:
            self.hidden.append(hidden)

    def _reach_middle(self, hidden: Tensor) -> None:
        self._middle = hidden

    def layer_of(self, attention: nn.Module) -> int:
        """Index of the layer that holds an attention module."""
        return self._index[id(attention)]

    def attention_probabilities(self, module: nn.Module) -> Tensor | None:
        """See :class:`softtrace.attention.AttentionListener`."""
        return None

    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        """See :class:`softtrace.attention.AttentionListener`."""
        raise NotImplementedError

    def after_attention(self, layer: int, output: Tensor) -> Tensor:
        """Return what the attention sub-block shall add to the residual stream."""
        return output

    def after_mlp(self, layer: int, output: Tensor) -> Tensor:
        """Return what the MLP sub-block shall add to the residual stream."""
        return output


class RecordingRun(Run):
    """Computes importances while the full model runs. Nothing of size H·T·T·d exists."""

    def __init__(
        self,
        anatomy: Anatomy,
        valid: Tensor,
        keep_hidden: bool = False,
        keep_attention: bool = True,
    ) -> None:
        super().__init__(anatomy, valid, keep_hidden)
        self.keep_attention = keep_attention
        self.layers: list[LayerEdges] = []
        self.attention: list[Tensor] = []
        self.visible: list[Tensor] = []
        self._attention: tuple[Tensor, Tensor] | None = None

    @override
    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        layer = self.layer_of(module)
        visible = visible & self.valid[:, :, None]
        with torch.autocast(value.device.type, enabled=False):
            norms = head_value_norms(value, self.anatomy.output_weight(layer))
            seen = probabilities * visible[:, None].to(probabilities.dtype)
            residual = l1_norm(self.entry) * self.valid
            self._attention = attention_shares(seen, norms, residual)
        self.visible.append(self._share_visible(visible))
        if self.keep_attention:
            self.attention.append(probabilities)
        return probabilities

    def _share_visible(self, visible: Tensor) -> Tensor:
        """Layers with the same window share one tensor: L bool maps of T² would add up."""
        for earlier in self.visible:
            if torch.equal(earlier, visible):
                return earlier
        return visible

    @override
    def after_mlp(self, layer: int, output: Tensor) -> Tensor:
        if self._attention is None:
            raise RuntimeError(f"layer {layer}: its attention did not ask for our function")
        with torch.autocast(output.device.type, enabled=False):
            residual, mlp = share_of_node(
                self._norm_at(layer, self.middle), self._norm_at(layer, output)
            )
        attention, attention_residual = self._attention
        self.layers.append(LayerEdges(attention, attention_residual, mlp, residual))
        self._attention = None
        return output

    def _norm_at(self, layer: int, part: Tensor) -> Tensor:
        """``[B, T]`` norm of a part of an after-MLP node, the last as the final norm reads it."""
        part = part.to(working_dtype(part.dtype))
        if layer == len(self.anatomy.layers) - 1:
            part = self.anatomy.linearised_final_norm(part)
        return l1_norm(part) * self.valid


class MaskedRun(Run):
    """Multiplies every edge by its mask; attention is not renormalised."""

    def __init__(
        self,
        anatomy: Anatomy,
        valid: Tensor,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None = None,
        keep_hidden: bool = False,
    ) -> None:
        super().__init__(anatomy, valid, keep_hidden)
        self.masks = masks
        self.recorded = attention

    @override
    def hooks(self) -> list[Hook]:
        hooks: list[Hook] = []
        for modules, masks in zip(self.anatomy.layers, self.masks, strict=True):
            hooks += KeptRows(modules.mlp, masks.mlp).hooks()
            if self.recorded is not None:
                for projection in modules.score_projections:
                    hooks += Unread(projection).hooks()
        return hooks + super().hooks()

    @override
    def attention_probabilities(self, module: nn.Module) -> Tensor | None:
        return None if self.recorded is None else self.recorded[self.layer_of(module)]

    @override
    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        mask = self.masks[self.layer_of(module)].attention
        if mask.dtype == torch.bool:
            return torch.where(mask, probabilities, 0.0)  # no copy of the mask as numbers
        return probabilities * mask

    @override
    def after_attention(self, layer: int, output: Tensor) -> Tensor:
        minus_one = self._minus_one(self.masks[layer].attention_residual, output)
        return torch.addcmul(output, minus_one, self.entry)

    @override
    def after_mlp(self, layer: int, output: Tensor) -> Tensor:
        masks = self.masks[layer]
        kept = masks.mlp.to(output.dtype)[..., None] * output
        return torch.addcmul(kept, self._minus_one(masks.mlp_residual, output), self.middle)

    @staticmethod
    def _minus_one(mask: Tensor, like: Tensor) -> Tensor:
        return (mask.to(like.dtype) - 1)[..., None]


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Eval mode for a run of ours: a recording and a masked run must be the same function.

    Each module's own train/eval flag is put back, not one flag for all.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
