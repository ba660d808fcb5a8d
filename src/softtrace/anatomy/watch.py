"""One watched run of a model: what every module inside the layers read and gave, and when.

Discovery and the proof read these notes; nothing here knows of patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.tolerances import ROUNDINGS, rounding
from softtrace.errors import UnsupportedModelError
from softtrace.graph.attention_maps import AttentionMap
from softtrace.model.devices import arriving
from softtrace.model.flat_units import bare, is_flat_unit
from softtrace.model.hooks import first_tensor
from softtrace.model.sharding import own_weights
from softtrace.model.zero_units import size_of


@dataclass(eq=False)  # two calls are never the same one
class Call:
    """One call of one module. ``read`` and ``gave`` are its first floating tensors, copied."""

    name: str
    module: nn.Module
    begin: int
    end: int = -1
    read: Tensor | None = None
    gave: Tensor | None = None

    def on(self, device: torch.device) -> Call:
        """The same with its tensors there."""
        tensors = (self.read, self.gave)
        read, gave = (None if each is None else each.to(device) for each in tensors)
        return replace(self, read=read, gave=gave)

    @property
    def depth(self) -> int:
        """0 for a child of the layer."""
        return self.name.count(".")

    def reads(self, expected: Tensor, valid: Tensor) -> bool:
        """Whether it read ``expected`` ``[B, T, d]``, whatever way it was reshaped."""
        if self.read is None or self.read.numel() != expected.numel():
            return False
        read = self.read.reshape(expected.shape)[valid]
        return rounding(read, expected[valid]) <= ROUNDINGS


@dataclass
class Attended:
    """One use of attention: who asked, with what probabilities and values, and when."""

    module: nn.Module
    probabilities: Tensor
    value: Tensor
    visible: Tensor
    at: int


@dataclass
class LayerSight:
    """Notes on one layer.

    Attributes:
        layer: the module.
        entry: ``[B, T, d_model]``, the node that entered.
        output: ``[B, T, d_model]``, the node that left.
        calls: of its modules, by their end.
        attention: every use of attention inside it.
    """

    layer: nn.Module
    entry: Tensor
    output: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    attention: list[Attended] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """B · T."""
        return self.entry.shape[0] * self.entry.shape[1]


class Watch:
    """Follows one forward: a stack of running modules, notes a layer, and attention as it comes."""

    reads_visible = True

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model = model
        self.layers: list[LayerSight] = []
        self.outside: list[Call] = []
        self._stack: list[Call] = []
        self._current: LayerSight | None = None
        self._clock = 0
        self._is_layer = {id(layer) for layer in layers}

    def asking(self) -> nn.Module | None:
        """The innermost running module with parameters: who a softmax belongs to."""
        for call in reversed(self._stack):
            if self._current is not None and any(map(own_weights, call.module.modules())):
                return call.module
        return None

    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        """See :class:`softtrace.model.attention_interface.AttentionListener`."""
        if self._current is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} asks for attention outside the stack of layers"
            )
        self._current.attention.append(
            Attended(module, probabilities.whole().clone(), value.clone(), visible, self._tick())
        )
        return probabilities

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = first_tensor(args, kwargs)
            if id(module) in self._is_layer and self._current is None:
                if read is None or read.dim() != 3:
                    raise UnsupportedModelError(
                        f"layer {len(self.layers)} ({type(module).__name__}) reads no residual "
                        f"stream of shape [B, T, d_model]: found "
                        f"{None if read is None else tuple(read.shape)}"
                    )
                self._current = LayerSight(module, arriving(module, read).clone())
                self.layers.append(self._current)
            call = Call(name, module, self._tick(), read=None if read is None else read.clone())
            self._stack.append(call)

        return hook

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = self._stack.pop()
        gave = first_tensor(output)
        call.gave = None if gave is None else gave.clone()
        call.end = self._tick()
        if self._current is None:
            self.outside.append(call)
        elif module is self._current.layer:
            self._current.output, self._current = call.gave, None
        else:
            self._current.calls.append(call)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Put hooks on every module of the model; take them back at exit."""
        prefixes = {id(layer): f"{name}." for name, layer in self.model.named_modules()
                    if id(layer) in self._is_layer}  # fmt: skip
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if module is self.model or is_flat_unit(module):
                    continue
                inside = [prefix for prefix in prefixes.values() if name.startswith(prefix)]
                short = name.removeprefix(inside[0]) if inside else name
                for handle in (
                    module.register_forward_pre_hook(self._enter(short), with_kwargs=True),
                    module.register_forward_hook(self._leave, with_kwargs=True),
                ):
                    hooks.enter_context(handle)
            yield self


def decoder_of(model: nn.Module) -> nn.Module | None:
    """What transformers says is the decoder of a model."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    return decoder if isinstance(decoder, nn.Module) else None


def running_layers(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, Sequence[nn.Module]]:
    """The decoder's layers: members of the longest outermost ``ModuleList`` that ran.

    Args:
        model: a causal language model.
        run: runs it once.

    Returns:
        What ``run`` gave, and the layers, first to last.

    Raises:
        UnsupportedModelError: no decoder, or no list of layers in it.
    """
    decoder = decoder_of(model)
    if decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers causal language model "
            "(it has no get_decoder()); pass the model that AutoModelForCausalLM returns"
        )
    lists = _lists(decoder) or _lists(model)  # ModernBERT's decoder is its head
    outermost = [
        module
        for name, module in lists.items()
        if not any(name != other and name.startswith(f"{other}.") for other in lists)
    ]
    ran: set[int] = set()
    with ExitStack() as hooks:
        for member in chain.from_iterable(outermost):
            handle = member.register_forward_pre_hook(lambda module, args: ran.add(id(module)))
            hooks.enter_context(handle)
        output = run()
    # A model of images or sound has other stacks, which token ids do not reach.
    found = [each for each in outermost if all(id(member) in ran for member in each)] or outermost
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {type(decoder).__name__} has no ModuleList of layers"
        )
    longest: nn.ModuleList = max(found, key=lambda each: (len(each), _size(each)))
    return output, tuple(map(bare, longest))


def _lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}


def _size(module: nn.Module) -> int:
    return sum(map(size_of, module.parameters()))


def rows_of(values: Tensor | None, sight: LayerSight) -> Tensor | None:
    """``[B · T, d_model]`` of a tensor that has one vector a token; None for any other."""
    if values is None or values.numel() != sight.entry.numel():
        return None
    if values.shape[-1] != sight.entry.shape[-1]:
        return None
    return values.reshape(sight.rows, -1)


@dataclass(eq=False)
class Candidate(Call):
    """A call that may be a term of what its layer adds up, with what it read and gave as rows.

    Attributes:
        read_rows: ``[rows, d_model]`` of real tokens; NaN where it read no vector a token.
        gave_rows: as ``read_rows``, of what it gave.
    """

    read_rows: Tensor = field(kw_only=True)
    gave_rows: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, call: Call, sight: LayerSight, kept: Tensor) -> Candidate:
        """The candidate that a call is.

        Args:
            call: of a module of the layer.
            sight: notes on the layer.
            kept: ``[B · T]`` bool, the rows of real tokens.
        """
        like = sight.entry.reshape(sight.rows, -1)[kept]

        def rows(values: Tensor | None) -> Tensor:
            found = rows_of(values, sight)
            return torch.full_like(like, torch.nan) if found is None else found[kept].to(like)

        return cls(**vars(call), read_rows=rows(call.read), gave_rows=rows(call.gave))
