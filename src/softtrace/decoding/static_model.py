"""A model run in two parts over a cache of fixed size, so that each part can be compiled.

The parts are those of :mod:`softtrace.decoding.split_model`. Here the layers are told what to do
once for all, not anew for every run: a compiler that follows the code finds the same code again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.decoding.few_rows import fast_few_rows
from softtrace.decoding.split_model import counter, first_layers, with_forwards, without_head
from softtrace.decoding.static_cache import masks_by_position, position_cache
from softtrace.model.wrappers import forward_parameters, one_logit, with_cache


@dataclass
class _Passing:
    """What passes from the first layers to the rest, and which of them is running."""

    part: str = "whole"
    stream: Any = None
    others: tuple[None, ...] | None = None  # what layers give beside the stream; None: a tensor


class _Gate:
    """Stands in front of one of the first layers.

    Args:
        layer: the module.
        passing: shared by all.
        exit_map: what the last of the first layers hands to the exit's norm and head is this of the
            residual stream; None hands on the stream.
        last: whether the exit is behind this layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        passing: _Passing,
        exit_map: Callable[[Tensor], Tensor] | None,
        last: bool,
    ) -> None:
        self.own, self.passing, self.exit_map, self.last = layer.forward, passing, exit_map, last

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        passing = self.passing
        if passing.part == "rest":  # the first layers ran before; all pass on what they gave
            given = passing.stream
            return given if passing.others is None else (given, *passing.others)
        output = self.own(hidden_states, *args, **kwargs)
        if not self.last or passing.part != "first":
            return output
        if isinstance(output, Tensor):
            passing.stream, passing.others = output, None
        else:
            passing.stream, passing.others = output[0], (None,) * (len(output) - 1)
        if self.exit_map is None:
            return output
        # The one place where what an exit reads differs from the residual stream.
        mapped = self.exit_map(passing.stream)
        return mapped if passing.others is None else (mapped, *passing.others)


class StaticModel:
    """The first layers of a model and the rest of it, over one cache of fixed size.

    All runs read tokens ``[B, N]`` at positions ``start`` and after, inside :meth:`prepared` and
    after :meth:`choose`; they change nothing but tensors, so that they can be compiled.

    Args:
        model: a causal language model of transformers that
            :func:`softtrace.decoding.check_early_exit` accepts, in eval mode.
        layers: its decoder layers.
        depth: how many are the first part, 1 to L - 1.
        rows: B.
        capacity: positions that the cache has room for.
        exit_map: applied to the residual stream ``[B, N, D]`` before the exit's norm and head; None
            for no map.

    Attributes:
        start: ``[B, 1]`` int64, to be moved in place.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        depth: int,
        rows: int,
        capacity: int,
        exit_map: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.model, self.layers, self.depth = model, layers, depth
        self.device = next(model.parameters()).device
        self.start = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.cache = position_cache(len(layers), self.start, capacity)
        self._counter, self._passing = counter(model), _Passing()
        self._base = without_head(model)
        self._gates = [
            _Gate(layer, self._passing, exit_map, place == depth - 1)
            for place, layer in enumerate(layers[:depth])
        ]
        parameters = forward_parameters(model)
        self._into, self._last_alone = with_cache(parameters, self.cache), one_logit(parameters)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Put gates and masks in place, and take them away again at exit."""
        with (
            masks_by_position(),
            first_layers(self.model, len(self.layers)),
            fast_few_rows(self.model),
            with_forwards(self.layers[: self.depth], self._gates),
        ):
            try:
                yield
            finally:
                self._passing.stream = None

    def choose(self, part: str) -> None:
        """Say what is run next: "whole", "first" or "rest"."""
        self._passing.part = part
        self._counter.num_hidden_layers = self.depth if part == "first" else len(self.layers)

    def read(self, tokens: Tensor) -> None:
        """Run "whole" for what it leaves in the cache."""
        self._run(tokens, self.model, **self._last_alone)

    def whole(self, tokens: Tensor) -> Tensor:
        """Run all layers; logits ``[B, N, V]``."""
        return self._logits(tokens)

    def first(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first layers; logits of the exit ``[B, N, V]``, residual stream ``[B, N, D]``."""
        logits = self._logits(tokens)
        return logits, self._passing.stream

    def stream(self, tokens: Tensor) -> Tensor:
        """Run "first" without the head; residual stream ``[B, N, D]``."""
        self._run(tokens, self._base)
        stream: Tensor = self._passing.stream
        return stream

    def rest(self, tokens: Tensor, stream: Tensor) -> Tensor:
        """Continue from what :meth:`first` gave for these tokens; logits ``[B, N, V]``."""
        self._passing.stream = stream
        return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._run(tokens, self.model).logits
        return logits

    def _run(self, tokens: Tensor, model: nn.Module, **options: int) -> Any:
        positions = self.start + torch.arange(tokens.shape[1], device=self.device)
        return model(input_ids=tokens, position_ids=positions, **self._into, **options)
