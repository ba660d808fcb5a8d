"""Early exits of stock models: proving that they are exits, and choosing one.

transformers exits early by setting ``config.num_hidden_layers``. Self-speculation with such exits:
LayerSkip (arXiv 2404.16710).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.families.proof import tolerance
from softtrace.families.refusals import running
from softtrace.families.sight import mismatch
from softtrace.instrument import Instrument, attach
from softtrace.modes import dropout_off

EXIT_FIELD = "softtrace_exit_layer"
"""Field of a model's config that holds the recommended exit layer."""


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

    Has an effect only on models that :func:`check_early_exit` accepts.
    """
    config = counter(model)
    own = config.num_hidden_layers
    try:
        config.num_hidden_layers = count
        yield
    finally:
        config.num_hidden_layers = own


@torch.no_grad()
def check_early_exit(model: nn.Module) -> int:
    """Prove that early exits exit early, and return the number of layers.

    transformers sets ``config.num_hidden_layers``; models whose forward does not look at it (GPT-2,
    GPT-NeoX, Falcon, OPT, ...) run all their layers and say nothing.

    Raises:
        UnsupportedModelError: the exit is ignored, or gives something else than the residual
            stream after that layer, normed and read by the head; or see :func:`softtrace.attach`.
    """
    instrument = attach(model)
    layers = len(instrument.anatomy.layers)
    name = type(model).__name__
    if layers < 2:
        raise UnsupportedModelError(f"{name} has {layers} layer; an early exit needs two at least")
    ids = _some_ids(instrument, model)
    recording = instrument.record(ids, keep_hidden=True, keep_attention=False)
    hidden = recording.hidden or ()
    allowed = tolerance(next(model.parameters()).dtype)
    for depth in {1, layers // 2, layers - 1}:
        with dropout_off(model):
            wanted = instrument.anatomy.readout.early(hidden[depth])
            with first_layers(model, depth):
                found = model(input_ids=ids, use_cache=False).logits
        if mismatch(found, wanted) > allowed:
            if mismatch(found, recording.logits) <= allowed:
                raise UnsupportedModelError(
                    f"{name} runs all {layers} layers whatever config.num_hidden_layers says, so "
                    "assistant_early_exit would be ignored without a word; decode it plainly"
                )
            raise UnsupportedModelError(
                f"{name}: an exit after {depth} layers is not the residual stream there read by "
                f"the final norm and the head (mismatch {mismatch(found, wanted):.2g}, allowed "
                f"{allowed:.2g}); decode it plainly"
            )
    return layers


def _some_ids(instrument: Instrument, model: nn.Module) -> Tensor:
    """Six tokens, ``[1, 6]``, to compare two ways of running a model on."""
    ids = torch.arange(6, device=next(model.parameters()).device)[None]
    return ids % instrument.anatomy.vocabulary


@torch.no_grad()
def check_cache(model: nn.Module) -> None:
    """Prove that a model can go on from a cache that grows and is cut.

    Raises:
        UnsupportedModelError: it cannot, or its logits are others then.
    """
    ids = _some_ids(attach(model), model)
    name, cache = type(model).__name__, DynamicCache()
    with dropout_off(model), running(f"{name} does not run with transformers' DynamicCache"):
        wanted = model(input_ids=ids, use_cache=False).logits[:, 3:]
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        forget(cache.layers, 1)
        found = model(input_ids=ids[:, 3:], past_key_values=cache, use_cache=True).logits
    error, allowed = mismatch(found, wanted), tolerance(wanted.dtype)
    if error > allowed:
        raise UnsupportedModelError(
            f"{name} says something else when it goes on from a cache (mismatch {error:.2g}, "
            f"allowed {allowed:.2g}); decode it with model.generate"
        )


def exit_layer_of(model: nn.Module) -> int:
    """The exit layer that the model's config recommends.

    Raises:
        InvalidInputError: it recommends none.
    """
    found = getattr(getattr(model, "config", None), EXIT_FIELD, None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise InvalidInputError(
            f"exit_layer: found none, and the model's config has no {EXIT_FIELD} (softtrace fit "
            "writes it; softtrace decode-bench measures every layer). Pass exit_layer"
        )
    return found


def refuse_moving_rotations(model: nn.Module, start: int, new_tokens: int) -> None:
    """Refuse texts over which rotary frequencies change: a check would see other ones than a step.

    Args:
        model: a causal language model of transformers.
        start: tokens of the prompt.
        new_tokens: tokens to write at most.

    Raises:
        UnsupportedModelError: 'dynamic' or 'longrope' scaling, and a text that crosses the length
            where it sets in.
    """
    config: Any = counter(model)
    end = start + new_tokens
    parameters = getattr(config, "rope_parameters", None) or {}
    layouts = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    for layout in layouts:
        kind = layout.get("rope_type")
        field = "original_max_position_embeddings"
        limit: Any = layout.get(field) or getattr(config, field, None)
        limit = limit or config.max_position_embeddings
        crosses = end > limit if kind == "dynamic" else start <= limit < end
        if kind in ("dynamic", "longrope") and crosses:
            raise UnsupportedModelError(
                f"{type(model).__name__} changes its rotary frequencies ({kind}) beyond {limit} "
                f"tokens, and this text would go from {start} to {end}: drafts would be checked "
                "with other frequencies than plain decoding uses. Keep it shorter or decode plainly"
            )


def check_exit_layer(depth: int, layers: int) -> None:
    """Raise :class:`InvalidInputError` unless an exit layer is an integer from 1 to L - 1."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < layers:
        raise InvalidInputError(f"exit_layer: found {depth!r}, allowed 1 to {layers - 1}")


def forget(layers: Sequence[Any], tokens: int) -> None:
    """Take the newest tokens out of layers of a cache."""
    if tokens:
        for layer in layers:
            layer.crop(-tokens)
