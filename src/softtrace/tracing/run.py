"""The two kinds of run: one records importances, the other masks edges. Hooks, no model code.

A masked run can use the attention probabilities of the recording run or compute its own. Recorded
ones make identity 3 exact: an edge is A·V·W_O with the full model's A, so masking elsewhere cannot
reach a position through the softmax's denominator, to which the keys of all visible tokens
contribute, also of tokens whose edges are all absent.

Identity 5: adding (mask - 1)·residual to a sub-block's output turns ``residual + output`` into
``mask·residual + output``, so residual edges are masked without touching the model's forward. Where
the output is multiplied by a constant before the sum, what is added is divided by it. Then, and in
half precision, the sum rounds: a node none of whose edges is kept is not zero but rounding error,
which a norm blows up. There the node is computed exactly beside the model's own sum, and put in its
place where it is read: at the input of the MLP's norm and at the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.anatomy.anatomy import Anatomy
from softtrace.errors import InvalidInputError
from softtrace.graph.batch import Batch, documents_of
from softtrace.graph.edges import LayerEdges
from softtrace.graph.importance import (
    LayerNorms,
    carried_norms,
    edge_shares,
    head_value_norms,
    l1_norm,
    working_dtype,
)
from softtrace.model.hooks import Hook, on_input, on_output
from softtrace.tracing.skipping import KeptRows, Unread, kept_rows


class DeepEnough(BaseException):
    """Ends a forward whose deeper layers nobody reads; handlers of errors shall not see it."""


class Run:
    """Follows one forward through the layers; subclasses record or mask at each half-layer.

    Attributes:
        anatomy: of the model.
        batch: that runs through it.
        valid: ``[B, T]`` bool, False at padding.
        hidden: with ``keep_hidden``, the residual stream entering each layer and the final norm.
    """

    def __init__(self, anatomy: Anatomy, batch: Batch, keep_hidden: bool = False) -> None:
        self.anatomy = anatomy
        self.batch = batch
        self.valid = batch.valid
        self.hidden: list[Tensor] | None = [] if keep_hidden else None
        self._index = {id(modules.attention): i for i, modules in enumerate(anatomy.layers)}
        self._entry: Tensor | None = None
        self._middle: Tensor | None = None

    def hooks(self) -> list[Hook]:
        """Everything to register around the forward."""
        return self.listeners()

    def listeners(self) -> list[Hook]:
        """Hooks that see a module's full input and output."""
        hooks: list[Hook] = []
        for index, modules in enumerate(self.anatomy.layers):
            hooks.append(Hook(modules.layer, on_input(self._enter), True))
            hooks.append(
                Hook(modules.attention_out, on_output(partial(self._attention_gave, index)), False)
            )
            middle = on_input(self._reach_middle)
            hooks += [Hook(module, middle, True) for module in modules.middle]
            for part, module in enumerate(modules.mlp_out):
                hooks.append(Hook(module, on_output(partial(self._mlp_gave, index, part)), False))
        if self.hidden is not None:
            hooks.append(Hook(self.anatomy.readout.norm.module, on_input(self._read_last), True))
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

    def _enter(self, hidden: Tensor) -> Tensor | None:
        self._entry, self._middle = hidden, None
        if self.hidden is not None:
            self.hidden.append(hidden)
        return None

    def _read_last(self, hidden: Tensor) -> Tensor | None:
        if self.hidden:  # nanochat norms the embedding with the same module, before any layer
            self.hidden.append(hidden)
        return None

    def _reach_middle(self, hidden: Tensor) -> Tensor | None:
        if self._middle is None:
            self._middle = hidden.reshape(self.entry.shape)  # OPT flattens rows and tokens
        return None

    def _attention_gave(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        shape = self.entry.shape
        changed = self.after_attention(layer, read.reshape(*shape[:2], -1), output.reshape(shape))
        return changed.reshape(output.shape)

    def _mlp_gave(self, layer: int, part: int, read: Tensor, output: Tensor) -> Tensor:
        changed = self.after_mlp(layer, part, output.reshape(self.entry.shape))
        return changed.reshape(output.shape)

    def layer_of(self, attention: nn.Module) -> int:
        """Index of the layer that holds an attention module."""
        return self._index[id(attention)]

    def attention_probabilities(self, module: nn.Module) -> Tensor | None:
        """See :class:`softtrace.model.attention_interface.AttentionListener`."""
        return None

    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        """See :class:`softtrace.model.attention_interface.AttentionListener`."""
        raise NotImplementedError

    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        """Return what the attention sub-block shall add to the residual stream.

        Args:
            layer: index.
            read: ``[B, T, ...]``, what the module that gave the output had read.
            output: ``[B, T, d_model]``, before the residual multiplier.
        """
        return output

    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        """Return what one part of the MLP sub-block shall add to the residual stream."""
        return output


@dataclass
class _LayerNotes:
    """What one layer has given so far, in the order in which its sub-blocks run."""

    probabilities: Tensor | None = None
    values: Tensor | None = None  # ``[B, H, S]`` norms, see head_value_norms
    attended: bool = False
    scale: Tensor | None = None  # ``[B, T]`` of its attention edges; None for 1
    added: list[Tensor] = field(default_factory=list)  # by the parts of its MLP


class RecordingRun(Run):
    """Computes importances while the full model runs. Nothing of size H·T·T·d exists."""

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        keep_hidden: bool = False,
        keep_attention: bool = True,
    ) -> None:
        super().__init__(anatomy, batch, keep_hidden)
        self.keep_attention = keep_attention
        packed = batch.positions if batch.packed else None
        self._documents = None if packed is None else documents_of(packed)
        self.attention: list[Tensor] = []
        self.visible: list[Tensor] = []
        self._masks: list[tuple[Tensor, Tensor]] = []
        self._notes = [_LayerNotes() for _ in anatomy.layers]
        self._norms: list[LayerNorms] = []

    @override
    def on_attention(
        self, module: nn.Module, probabilities: Tensor, value: Tensor, visible: Tensor
    ) -> Tensor:
        layer = self.layer_of(module)
        visible, notes = self._existing(visible), self._notes[layer]
        with torch.autocast(value.device.type, enabled=False):
            notes.values = head_value_norms(value, self.anatomy.carried_weight(layer))
            notes.probabilities = torch.where(visible[:, None], probabilities, 0.0)
        self.visible.append(visible)
        if self.keep_attention:
            self.attention.append(probabilities)
        return probabilities

    @staticmethod
    def _require_apart(visible: Tensor, documents: Tensor) -> None:
        if bool((visible & (documents[:, :, None] != documents[:, None, :])).any()):
            raise InvalidInputError(
                "position_ids: they start anew inside a row (packed documents), but this model "
                "lets a token look at the document before its own; give each document a row"
            )

    def _existing(self, visible: Tensor) -> Tensor:
        """Which edges exist. Layers with the same window share one tensor: L maps would add up."""
        # Most models hand all layers one mask; comparing values would wait for the device.
        memory = (visible.data_ptr(), visible.shape, visible.stride())
        for given, existing in self._masks:
            if (given.data_ptr(), given.shape, given.stride()) == memory:
                return existing
        existing = visible & self.valid[:, :, None] & self.valid[:, None, :]
        if self._documents is not None:
            self._require_apart(existing, self._documents)
        existing = next((e for _, e in self._masks if torch.equal(e, existing)), existing)
        # The last two stay alive, so that their addresses are not given away.
        self._masks = [*self._masks[-1:], (visible, existing)]
        return existing

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        modules, notes = self.anatomy.layers[layer], self._notes[layer]
        if modules.attention_norm is not None:
            with torch.autocast(output.device.type, enabled=False):
                normed = modules.attention_norm.scale(read, output)[..., 0].abs()
                notes.scale = normed * abs(modules.attention_scale)
        elif modules.attention_scale != 1:
            size = abs(modules.attention_scale)
            notes.scale = torch.full_like(self.valid, size, dtype=working_dtype(output.dtype))
        notes.attended = True
        self._finish(layer)
        return output

    @override
    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        self._notes[layer].added.append(output)
        self._finish(layer)
        # Falcon adds attention's output to this tensor in place, which autograd would not forgive.
        writes = self.anatomy.layers[layer].parallel and torch.is_grad_enabled()
        return output.clone() if writes else output

    def _finish(self, layer: int) -> None:
        """Put the layer's norms together once both sub-blocks have run."""
        modules, notes = self.anatomy.layers[layer], self._notes[layer]
        if not notes.attended or len(notes.added) < len(modules.mlp_out):
            return
        if notes.probabilities is None or notes.values is None:
            raise RuntimeError(f"layer {layer}: its attention did not ask for our function")
        with torch.autocast(notes.values.device.type, enabled=False):
            added, *more = notes.added
            if more:
                added = sum(more, added.to(working_dtype(added.dtype)))
            mlp = self._norm_at(layer, added)
            # A parallel layer's residual goes into the same node as its MLP.
            entry = self._norm_at(layer, self.entry) if modules.parallel else l1_norm(self.entry)
            self._norms.append(
                LayerNorms(
                    carried_norms(notes.probabilities, notes.values, notes.scale),
                    entry,
                    mlp if modules.mlp_scale == 1 else mlp * abs(modules.mlp_scale),
                    None if modules.parallel else self._norm_at(layer, self.middle),
                )
            )
        self._notes[layer] = _LayerNotes()  # what it held is not needed any more

    def _norm_at(self, layer: int, part: Tensor) -> Tensor:
        """``[B, T]`` norm of a part of an after-MLP node, the last as the final norm reads it."""
        if layer == len(self.anatomy.layers) - 1:
            part = self.anatomy.readout.norm.linear(part.to(working_dtype(part.dtype)))
        return l1_norm(part)

    def importances(self) -> tuple[LayerEdges, ...]:
        """Of every layer, once the forward has ended; asked for once."""
        with torch.autocast(self.valid.device.type, enabled=False):
            return edge_shares(self._norms, self.valid)


class MaskedRun(Run):
    """Multiplies every edge by its mask; attention is not renormalised."""

    own_sums = False  # whether the model's own sums are right even where nobody reads them

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None = None,
        keep_hidden: bool = False,
        exact: bool = False,
        stop: int | None = None,
    ) -> None:
        super().__init__(anatomy, batch, keep_hidden)
        self.masks = masks
        self.recorded = attention
        self.exact = exact
        self.stop = stop
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
        kept = kept_rows([masks.mlp for masks in self.masks])
        for modules, rows in zip(self.anatomy.layers, kept, strict=True):
            for module in modules.token_wise:
                hooks += KeptRows(module, rows).hooks()
            if self.recorded is not None:
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

    def _rounds(self, layer: int) -> bool:
        """Whether the model's own sums round where an edge is masked (see the module's notes)."""
        modules = self.anatomy.layers[layer]
        scaled = modules.attention_scale != 1 or modules.mlp_scale != 1
        half = self.entry.dtype.itemsize < 4
        return self.exact or scaled or half or torch.is_autocast_enabled(self.entry.device.type)

    def _gates(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:
        """``[B, T, 1]`` masks of the attention residual, the MLP and the MLP residual."""
        if self._cast is None or self._cast[0].dtype != like.dtype:
            # Of all layers at once: on a GPU each operation is a launch.
            nodes = torch.stack([part for masks in self.masks for part in masks.nodes()])
            self._cast = nodes.to(like.dtype)[..., None].unbind()
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
