"""Recording runs: importances while the full model runs, and all that is made from them later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.anatomy.anatomy import Anatomy
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import AttentionMap, HeldMap, are_held, chunk_elements
from softtrace.graph.batch import Batch, documents_of
from softtrace.graph.edges import EdgeImportance, LayerEdges
from softtrace.graph.importance import (
    LayerNorms,
    Norm,
    SummedMap,
    carried_map,
    carried_norms,
    edge_shares,
    head_value_norms,
    norm_of,
    working_dtype,
)
from softtrace.graph.proximity import attention_proximity, proximity
from softtrace.model.hooks import Hook, on_output
from softtrace.model.sharding import reaching, unit_of
from softtrace.tracing.run import Run

logger = logging.getLogger(__name__)


@lru_cache
def _say_held(attention: str, gib: int) -> None:
    """Say once why this takes so much memory."""
    logger.warning(
        "%s makes the probabilities of all its heads in its own code, so that they are held for "
        "every layer: %d GiB. Models that follow transformers' attention interface need no such "
        "maps; give shorter or fewer sequences",
        attention,
        gib,
    )


@dataclass(frozen=True)
class Recording:
    """What a recording run saw.

    Attributes:
        batch: that ran; masked runs take it again.
        logits: ``[B, T, V]``, the full model's; of chosen positions alone ``[n, V]``.
        importance: of every edge.
        attention: probabilities of each layer, ``[B, H, T, S]``, for masked runs; of long sequences
            maps that make them. Empty if not kept.
        hidden: residual stream entering each layer, then entering the final norm: L + 1 tensors
            ``[B, T, d_model]``; None unless asked for.
        positions: ``[B, T]`` bool, the n positions whose logits were made; None for all.
    """

    batch: Batch
    logits: Tensor
    importance: EdgeImportance
    attention: tuple[Tensor | AttentionMap, ...]
    hidden: tuple[Tensor, ...] | None
    positions: Tensor | None = None

    def logits_of(self, places: Tensor) -> Tensor:
        """``[m, V]``, the full model's logits at some places, numbers into ``[B·T]``.

        Where positions were chosen, places are among them.
        """
        if self.positions is None:
            return self.logits.flatten(0, 1).index_select(0, places)
        row = self.positions.flatten().cumsum(0) - 1
        return self.logits.index_select(0, row.index_select(0, places))


@dataclass
class _LayerNotes:
    """What one layer has given so far, in the order in which its sub-blocks run."""

    probabilities: AttentionMap | None = None
    visible: Tensor | None = None
    values: Tensor | None = None  # ``[B, H, S]`` norms, see head_value_norms; values for proximity
    attended: Tensor | None = None  # what attention adds, before ``attention_scale``
    summed: SummedMap | None = None  # while attention runs
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
        norm: Norm = "l1",
        static: bool = False,
    ) -> None:
        super().__init__(anatomy, batch, keep_hidden)
        self.norm = norm
        self.static = static
        self._order = 2 if norm == "l2" else 1
        self.keep_attention = keep_attention
        packed = batch.positions if batch.packed else None
        self._documents = None if packed is None else documents_of(packed)
        self._padded = static or not bool(batch.valid.all())
        self.attention: list[AttentionMap] = []
        self.visible: list[Tensor] = []
        self._masks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._notes = [_LayerNotes() for _ in anatomy.layers]
        self._norms: list[LayerNorms] = []
        self._last: Tensor | None = None

    @override
    def listeners(self) -> list[Hook]:
        hooks, last = super().listeners(), self.anatomy.layers[-1].layer
        if unit_of(last) is not None and torch.is_grad_enabled():
            hooks.append(Hook(last, on_output(self._leave_last), False))
        return hooks

    def _leave_last(self, read: Tensor, output: Tensor) -> Tensor:
        self._last = output
        return output

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        layer = self.layer_of(module)
        (visible, shown), notes = self._existing(visible), self._notes[layer]
        with torch.autocast(value.device.type, enabled=False):
            notes.values = (
                value
                if self.norm == "ifr"
                else head_value_norms(value, self.anatomy.carried_weight(layer), self._order)
            )
            layers = len(self.anatomy.layers)
            fits = are_held(layers, probabilities.shape, value.device)
            if probabilities.held and not fits:
                _say_held(type(module).__name__, layers * probabilities.shape.numel() >> 28)
            if self.norm == "ifr" or fits:
                probabilities = probabilities.hold()
            notes.probabilities, notes.visible = probabilities, visible
        self.visible.append(shown)
        if self.keep_attention:
            self.attention.append(probabilities)
        if self.norm == "ifr" or probabilities.held or torch.is_grad_enabled():
            return probabilities
        notes.summed = SummedMap(probabilities, visible, notes.values)
        return notes.summed

    @staticmethod
    def _require_apart(visible: Tensor, documents: Tensor) -> None:
        rows, length, _ = visible.shape
        step = max(1, chunk_elements(visible.device) // (rows * length))
        for start in range(0, length, step):
            part = slice(start, start + step)
            others = documents[:, part, None] != documents[:, None, :]
            if bool((visible[:, part] & others).any()):
                raise InvalidInputError(
                    "position_ids: they start anew inside a row (packed documents), but this model "
                    "lets a token look at the document before its own; give each document a row"
                )

    def _existing(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Which edges exist, on the layer's device and on the batch's.

        Layers with the same window share one tensor: L maps would add up.
        """
        # Most models hand all layers one mask; comparing values would wait for the device.
        memory = (visible.data_ptr(), visible.shape, visible.stride())
        for given, *existing in self._masks:
            if (given.data_ptr(), given.shape, given.stride()) == memory:
                return existing[0], existing[1]
        own = visible
        if self._padded:
            valid = self.valid.to(visible.device)
            own = visible & valid[:, :, None]
            own &= valid[:, None, :]
        if self._documents is not None and not self.static:
            self._require_apart(own, self._documents.to(own.device))
        shown = own.to(self.valid.device)
        if not self.static:
            shown = next((e for *_, e in self._masks if torch.equal(e, shown)), shown)
            if own.device == shown.device:
                own = shown
        # The last two stay alive, so that their addresses are not given away.
        self._masks = [*self._masks[-1:], (visible, own, shown)]
        return own, shown

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        modules, notes = self.anatomy.layers[layer], self._notes[layer]
        if modules.attention_norm is not None:
            with torch.autocast(output.device.type, enabled=False):
                normed = modules.attention_norm.scale(read, output)[..., 0].abs()
                notes.scale = normed * abs(modules.attention_scale)
        elif modules.attention_scale != 1:
            size = abs(modules.attention_scale)
            notes.scale = torch.full_like(
                self.valid, size, dtype=working_dtype(output.dtype), device=output.device
            )
        notes.attended = output
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
        if notes.attended is None or len(notes.added) < len(modules.mlp_out):
            return
        if notes.probabilities is None or notes.values is None:
            raise RuntimeError(f"layer {layer}: its attention did not ask for our function")
        with torch.autocast(notes.values.device.type, enabled=False):
            added, *more = notes.added
            if more:
                added = sum(more, added.to(working_dtype(added.dtype)))
            found = (
                self._proximities(layer, notes, added)
                if self.norm == "ifr"
                else self._norms_of(layer, notes, added)
            )
            self._norms.append(found.to(self.valid.device))
        self._notes[layer] = _LayerNotes()  # what it held is not needed any more

    def _norms_of(self, layer: int, notes: _LayerNotes, added: Tensor) -> LayerNorms:
        assert notes.values is not None
        modules = self.anatomy.layers[layer]
        # A parallel layer's residual goes into the same node as its MLP.
        entry = self._as_read(layer, self.entry) if modules.parallel else self.entry
        mlp = norm_of(self._as_read(layer, added), self._order)
        middle = None if modules.parallel else self._as_read(layer, self.middle)
        sums = None if notes.summed is None else notes.summed.sums
        if sums is not None and notes.scale is not None:
            sums = sums * notes.scale
        return LayerNorms(
            self._carried(notes, notes.values),
            norm_of(entry, self._order),
            mlp if modules.mlp_scale == 1 else mlp * abs(modules.mlp_scale),
            None if middle is None else norm_of(middle, self._order),
            sums,
        )

    def _carried(self, notes: _LayerNotes, norms: Tensor) -> Tensor | AttentionMap:
        if isinstance(notes.probabilities, HeldMap):
            return carried_norms(self._of_edges(notes), norms, notes.scale)
        assert notes.probabilities is not None
        assert notes.visible is not None
        return carried_map(notes.probabilities, notes.visible, norms, notes.scale)

    @staticmethod
    def _of_edges(notes: _LayerNotes) -> Tensor:
        """Probabilities that are held, ``[B, H, T, S]``, 0 where there is no edge."""
        assert isinstance(notes.probabilities, HeldMap)
        assert notes.visible is not None
        return torch.where(notes.visible[:, None], notes.probabilities.values, 0.0)

    def _proximities(self, layer: int, notes: _LayerNotes, added: Tensor) -> LayerNorms:
        modules = self.anatomy.layers[layer]
        assert notes.values is not None
        assert notes.attended is not None
        mlp = modules.mlp_scale * added
        after = self.entry + modules.attention_scale * notes.attended
        end = self._as_read(layer, after + mlp)
        node, entry = after, self.entry
        if modules.parallel:
            node, entry = end, self._as_read(layer, self.entry)
        weight = self.anatomy.carried_weight(layer)
        return LayerNorms(
            attention_proximity(self._of_edges(notes), notes.values, weight, notes.scale, node),
            proximity(entry, node),
            proximity(self._as_read(layer, mlp), end),
            None if modules.parallel else proximity(self._as_read(layer, after), end),
        )

    def _as_read(self, layer: int, part: Tensor) -> Tensor:
        """A part of an after-MLP node, the last layer's as the final norm reads it."""
        if layer == len(self.anatomy.layers) - 1:
            return self.anatomy.readout.norm.linear(part.to(working_dtype(part.dtype)))
        return part

    def importances(self) -> tuple[LayerEdges, ...]:
        """Importances of every layer; to be asked for once, after the forward has ended."""
        if self._last is not None:
            # The importances of other layers read what their own gives. This one's would go into a
            # unit of fully_shard past its output, where it gathers its weights.
            last = self._norms[-1]
            self._norms[-1] = replace(last, mlp=reaching(last.mlp, self._last))
        with torch.autocast(self.valid.device.type, enabled=False):
            return edge_shares(self._norms, self.valid)
