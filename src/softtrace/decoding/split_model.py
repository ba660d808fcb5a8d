"""A model run in two parts: its first layers a token at a time, those above over several at once.

What self-speculation runs (LayerSkip, arXiv 2404.16710, section 4.3: the check continues from what
the draft computed). transformers exits early by ``config.num_hidden_layers``; it has no way to go
on from there, so for that run the first layers are made to give what they gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softtrace.errors import UnsupportedModelError
from softtrace.model.exit_maps import exit_maps_of
from softtrace.model.wrappers import forward_parameters, one_logit, unwrapped, with_cache
from softtrace.tracing.attach import attach_whatever_hooks


def without_head(model: nn.Module) -> Any:
    """What of a model gives its residual stream; of PEFT's wrapper the base would have the head."""
    inside: Any = unwrapped(model)
    return getattr(inside, str(inside.base_model_prefix))


def counter(model: nn.Module) -> Any:
    """The config whose ``num_hidden_layers`` transformers changes for an early exit."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    config = getattr(base, "config", None)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no base model with config.num_hidden_layers, which "
            "early exits change; decode it without assistant_early_exit"
        )
    return config


@contextmanager
def first_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Let a model run its first layers only, the way transformers' early exit does.

    Has an effect only on models that :func:`softtrace.decoding.check_early_exit` accepts.
    """
    config = counter(model)
    own = config.num_hidden_layers
    try:
        config.num_hidden_layers = count
        yield
    finally:
        config.num_hidden_layers = own


@contextmanager
def exit_after(model: nn.Module, depth: int) -> Iterator[None]:
    """Let a model exit after so many layers, read through the exit's map where it has one."""
    maps = exit_maps_of(model)
    with first_layers(model, depth):
        if maps is None or maps.weight(depth) is None:
            yield
            return
        norm = attach_whatever_hooks(model).anatomy.readout.norm.module
        with norm.register_forward_pre_hook(lambda module, args: (maps(args[0], depth), *args[1:])):
            yield


@contextmanager
def with_forwards(
    layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Let each layer run a forward of ours.

    Hooks that others put on the layers run as ever, and see what ours gives.
    """
    own = [vars(layer).get("forward") for layer in layers]  # another library's, where there is one
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if before is not None:
                layer.forward = before


class TwoParts:
    """The first layers of a model and the rest of it, over one cache.

    Args:
        model: a causal language model of transformers that :mod:`softtrace.decoding.exit_checks`
            accepts.
        layers: its decoder layers.
        depth: how many are the first part, 1 to L - 1.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], depth: int) -> None:
        self.model, self.layers, self.depth = model, layers, depth
        self._base, self._parameters = without_head(model), forward_parameters(model)
        self.cache = DynamicCache()
        self._lower, self._upper = DynamicCache(), DynamicCache()
        self._read: list[Tensor] = []  # tokens that the first part has read and the rest has not
        self._gave: list[Any] = []  # and what its last layer gave for them

    def whole(self, input_ids: Tensor) -> Tensor:
        """Read a text ``[1, T]`` with all layers, before anything else; its last logits ``[V]``."""
        logits = self._run(input_ids, self.cache, **one_logit(self._parameters))[-1]
        layers = self.cache.layers
        self._lower.layers = layers[: self.depth]
        # Positions and masks come from the length of a cache's first layers, which have read more
        # than those above: in their place stands one that has not.
        self._upper.layers = [layers[self.depth]] * self.depth + layers[self.depth :]
        return logits

    def first(self, token: Tensor) -> Tensor:
        """Read one more token ``[1, 1]`` with the first layers; logits ``[V]`` of their exit."""
        with self._keeping(token), exit_after(self.model, self.depth):
            return self._run(token, self._lower)[-1]

    def follow(self, token: Tensor) -> None:
        """Read one more token likewise, without norm and head: nobody asks what comes next."""
        with self._keeping(token), first_layers(self.model, self.depth):
            self._base(input_ids=token, **with_cache(self._parameters, self._lower))

    @contextmanager
    def _keeping(self, token: Tensor) -> Iterator[None]:
        """Keep for :meth:`rest` what the last of the first layers gives for a token."""

        def listen(module: nn.Module, args: Any, output: Any) -> None:
            self._gave.append(output)

        # First of all hooks: what others make of the output they will make of it again.
        with self.layers[self.depth - 1].register_forward_hook(listen, prepend=True):
            yield
        self._read.append(token)

    def rest(self) -> Tensor:
        """Read with the other layers what the first ones have read since; logits ``[N, V]``."""
        tokens, gave = torch.cat(self._read, dim=1), self._gave
        if isinstance(gave[0], Tensor):
            output: Any = torch.cat(gave, dim=1)
        else:  # the stream first, then what nobody reads where attention is not asked for
            output = (torch.cat([each[0] for each in gave], dim=1), *gave[0][1:])
        self._read, self._gave = [], []
        lower = self.layers[: self.depth]  # which compute nothing, whatever they read
        with with_forwards(lower, [lambda *args, **kwargs: output] * len(lower)):
            return self._run(tokens, self._upper)

    def forget(self, tokens: int) -> None:
        """Take the newest tokens out of the cache of all layers."""
        forget(self.cache.layers, tokens)

    def _run(self, input_ids: Tensor, cache: DynamicCache, **options: int) -> Tensor:
        into = with_cache(self._parameters, cache)
        output = self.model(input_ids=input_ids, **into, **options)
        logits: Tensor = output.logits[0]
        return logits


def forget(layers: Sequence[Any], tokens: int) -> None:
    """Take the newest tokens out of layers of a cache."""
    if tokens:
        for layer in layers:
            layer.crop(-tokens)
