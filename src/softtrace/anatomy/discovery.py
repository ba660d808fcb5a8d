"""Takes a model apart by watching one tiny batch run through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from softtrace.anatomy.anatomy import Anatomy, LayerModules, Route
from softtrace.anatomy.decomposition import decompose
from softtrace.anatomy.readout import find_readout
from softtrace.anatomy.refusals import running
from softtrace.anatomy.tolerances import mismatch, typical_mismatch
from softtrace.anatomy.watch import Watch, decoder_of
from softtrace.errors import UnsupportedModelError
from softtrace.graph.batch import Batch
from softtrace.model.attention_interception import Interception, interception_active
from softtrace.model.attention_interface import softtrace_attention_active
from softtrace.model.devices import device_of_module
from softtrace.model.sharding import run

_TIED = "a module that is tied into two places has two nodes, whose edges cannot be told apart"
_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed")


@dataclass(frozen=True)
class PlainRun:
    """A model that ran once as it is: what is known before it is watched.

    Attributes:
        model: a causal language model, dropout off.
        inputs: keyword arguments of a tiny batch.
        logits: ``[B, T, V]``, the model's own on it.
        layers: of the decoder, first to last.
        configs: of the model and its modules.
        allowed: largest relative mismatch.
    """

    model: nn.Module
    inputs: dict[str, Any]
    logits: Tensor
    layers: Sequence[nn.Module]
    configs: Sequence[PretrainedConfig]
    allowed: float


def take_apart(plain: PlainRun) -> Anatomy:
    """Find what every layer adds up from, and how attention is reached.

    Raises:
        UnsupportedModelError: what each way to reach attention missed.
    """
    # norms of transformers compute in float32 in float64 models
    plain = replace(plain, allowed=max(plain.allowed, 1e-6))
    misses: dict[str, UnsupportedModelError] = {}
    for route in get_args(Route):
        try:
            return _by_route(plain, route)
        except UnsupportedModelError as error:
            misses[route] = error
    # What its own attention code showed, unless that showed no attention: its code came to an end.
    raise misses["interface" if "no softmax attention" in str(misses["interception"]) else
                 "interception"]  # fmt: skip


def _by_route(plain: PlainRun, route: Route) -> Anatomy:
    model, layers, allowed = plain.model, plain.layers, plain.allowed
    valid = plain.inputs["attention_mask"].bool()
    watch = Watch(model, layers)
    active: AbstractContextManager[Interception | None]
    active = softtrace_attention_active(plain.configs, watch)
    if route == "interception":
        active = interception_active(plain.configs, watch, watch.asking, valid.shape)
    what = f"{type(model).__name__} does not run with its attention in the open"
    with watch.watching(), active as mode, running(what):
        logits = run(model, **plain.inputs).logits
    if mode is not None and mode.softmaxes and not any(s.attention for s in watch.layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a softmax of scores [..., T, T] was seen, but no matrix "
            "product of it with values (an einsum, or a sum); the share of each source token "
            "cannot be followed. Allowed are torch.matmul, bmm and scaled_dot_product_attention"
        )
    error = typical_mismatch(logits[valid], plain.logits[valid])
    if not error <= 4 * allowed:
        raise UnsupportedModelError(
            f"attention in the open gives other logits than the model's own (they differ by "
            f"{error:.2g} of the largest value, allowed {4 * allowed:.0e}): its attention does "
            "something that is not in transformers' interface, or did not follow it"
        )
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModelError(f"{type(model).__name__} runs the same layer twice; {_TIED}")
    if [id(sight.layer) for sight in watch.layers] != [id(layer) for layer in layers]:
        raise UnsupportedModelError(
            f"{type(model).__name__}: of its {len(layers)} layers {len(watch.layers)} calls were "
            "seen; each has to run exactly once, in order"
        )
    for index, sight in enumerate(watch.layers):
        if sight.entry.shape[:2] != valid.shape:
            raise UnsupportedModelError(
                f"layer {index} ({type(sight.layer).__name__}) reads a residual stream of shape "
                f"{tuple(sight.entry.shape)} for token ids of shape {tuple(valid.shape)}; the "
                "graph has one node a token (is a prompt put before the tokens?)"
            )
    for index, (sight, later) in enumerate(zip(watch.layers, watch.layers[1:], strict=False)):
        if sight.output is None or _differ(later.entry, sight.output, valid) > allowed:
            raise UnsupportedModelError(
                f"layer {index + 1} does not read what layer {index} gave; something between the "
                "layers changes the residual stream"
            )
    decomposed = [
        decompose(index, sight, valid.to(sight.entry.device), allowed)
        for index, sight in enumerate(watch.layers)
    ]
    _require_own(model, [modules for _, modules in decomposed])
    heads = {sight.attention[0].probabilities.shape[1] for sight in watch.layers}
    if len(heads) != 1:
        raise UnsupportedModelError(
            f"layers have different numbers of heads ({sorted(heads)}); the graph has one"
        )
    last = watch.layers[-1].output
    assert last is not None
    return Anatomy(
        pattern="; ".join(dict.fromkeys(name for name, _ in decomposed)),
        route=route,
        layers=tuple(modules for _, modules in decomposed),
        readout=find_readout(
            model,
            [call.on(valid.device) for call in watch.outside],
            last.to(valid.device),
            logits,
            valid,
            allowed,
        ),
        heads=heads.pop(),
        vocabulary=vocabulary_of(model),
        positions=learned_positions(model),
        looks_at_padding=any(
            bool((seen.to(valid.device) & valid[:, :, None] & ~valid[:, None, :]).any())
            for seen in (sight.attention[0].visible for sight in watch.layers)
        ),
    )


def _differ(one: Tensor, other: Tensor, valid: Tensor) -> float:
    """Mismatch of two tensors ``[B, T, d]``, wherever they are, at real tokens."""
    return mismatch(one.to(valid.device)[valid], other.to(valid.device)[valid])


def _require_own(model: nn.Module, layers: Sequence[LayerModules]) -> None:
    """No layer may use a module that another layer uses too."""
    seen: dict[int, int] = {}
    for index, modules in enumerate(layers):
        own = (modules.attention, modules.projection, modules.attention_out, *modules.mlp_out)
        for module in {id(each): each for each in own}.values():
            other = seen.setdefault(id(module), index)
            if other != index:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: layers {other} and {index} share a "
                    f"{type(module).__name__}; {_TIED}"
                )


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the embedding of token ids."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        embedding = find() if callable(find) else None
    except NotImplementedError:
        embedding = None
    config = getattr(model, "config", None)
    found = getattr(embedding, "num_embeddings", getattr(config, "vocab_size", None))
    if not isinstance(found, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no embedding of token ids; softtrace is for causal "
            "language models, not for models of images or sound"
        )
    return found


def tiny_batch(model: nn.Module, length: int) -> Batch:
    """Two rows of random ids, one of them left-padded by two, on the model's device."""
    vocabulary, device = vocabulary_of(model), device_of_module(model)
    generator = torch.Generator().manual_seed(0)  # the global random state stays untouched
    ids = torch.randint(vocabulary, (2, length), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return Batch.of(ids.to(device), mask.to(device))


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a model with learned positions takes; None for any other model."""
    decoder = decoder_of(model)
    for name in _LEARNED_POSITIONS:
        table = getattr(decoder, name, None)
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - int(getattr(table, "offset", 0))
    return None
