"""A run: one forward of a model that is followed from half-layer to half-layer by hooks.

Two kinds are made of it: :mod:`softtrace.tracing.recording` measures what every edge carries,
:mod:`softtrace.tracing.masking` multiplies edges by masks. Neither touches the model's code.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import Anatomy
from softtrace.graph.attention_maps import AttentionMap
from softtrace.graph.batch import Batch
from softtrace.model.devices import arriving
from softtrace.model.hooks import Hook, on_input, on_output


class DeepEnough(BaseException):
    """Ends a forward whose deeper layers nobody reads; handlers of errors shall not see it."""


class Run:
    """Follows one forward through the layers; subclasses record or mask at each half-layer.

    Attributes:
        anatomy: of the model.
        batch: that runs through it.
        valid: ``[B, T]`` bool, False at padding.
        hidden: with ``keep_hidden``, the residual stream entering each layer and the final norm,
            on the batch's device, wherever the layers are.
        reads_visible: see :class:`softtrace.model.attention_interface.AttentionListener`.
    """

    reads_visible = True

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
            arrive = on_input(partial(self._arrive, modules.layer))
            hooks.append(Hook(modules.layer, arrive, True))
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

    def _arrive(self, layer: nn.Module, hidden: Tensor) -> Tensor | None:
        return self._enter(arriving(layer, hidden))

    def _enter(self, hidden: Tensor) -> Tensor | None:
        self._entry, self._middle = hidden, None
        if self.hidden is not None:
            self.hidden.append(hidden.to(self.valid.device))
        return None

    def _read_last(self, hidden: Tensor) -> Tensor | None:
        if self.hidden:  # nanochat norms the embedding with the same module, before any layer
            self.hidden.append(hidden.to(self.valid.device))
        return None

    def _reach_middle(self, hidden: Tensor) -> Tensor | None:
        if self._middle is None:
            self._middle = hidden.reshape(self.entry.shape)  # OPT flattens rows and tokens
        return None

    def _attention_gave(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        shape = self.entry.shape
        read = read.reshape(*shape[:2], -1)
        changed = self.after_attention(layer, read, _shaped(output, shape))
        return _shaped(changed, output.shape)

    def _mlp_gave(self, layer: int, part: int, read: Tensor, output: Tensor) -> Tensor:
        changed = self.after_mlp(layer, part, _shaped(output, self.entry.shape))
        return _shaped(changed, output.shape)

    def layer_of(self, attention: nn.Module) -> int:
        """Index of the layer that holds an attention module."""
        return self._index[id(attention)]

    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
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


def _shaped(values: Tensor, shape: torch.Size) -> Tensor:
    """Values in this shape, themselves if they have it: units of ``fully_shard`` warn of views."""
    return values if values.shape == shape else values.reshape(shape)
