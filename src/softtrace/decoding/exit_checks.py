"""Early exits of stock models: proving that they are exits, and choosing one.

transformers exits early by setting ``config.num_hidden_layers``. Self-speculation with such exits:
LayerSkip (arXiv 2404.16710).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.refusals import running
from softtrace.anatomy.tolerances import (
    cache_tolerance,
    mismatch,
    tolerance,
    typical_mismatch,
)
from softtrace.checks import as_integer
from softtrace.decoding.split_model import TwoParts, counter, first_layers
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.model.hooks import first_tensor
from softtrace.model.state import dropout_off
from softtrace.model.wrappers import unwrapped
from softtrace.tracing.attach import attach_whatever_hooks
from softtrace.tracing.instrument import Instrument

EXIT_FIELD = "softtrace_exit_layer"
"""Field of a model's config that holds the recommended exit layer."""


@dataclass(frozen=True)
class ProvenExit:
    """Early exits of one model that were proven; made by :func:`check_early_exit`.

    Attributes:
        model: The model as it was run for the proof, in the wrapper that it was handed in, if any.
        instrument: Instrument of the model as it was then.
        resumable: Exit layers after which the rest of the model can continue, over a cache that is
            cut; :func:`check_cache` adds them.
    """

    model: nn.Module
    instrument: Instrument
    resumable: frozenset[int] = frozenset()

    @property
    def layers(self) -> int:
        """How many layers the model has; exits are after 1 to one less."""
        return len(self.instrument.anatomy.layers)

    def check_model(self, model: nn.Module) -> None:
        """Raise :class:`InvalidInputError` unless ``model`` is the one proven, as it was then."""
        if model is not self.model or not self.instrument.fits(unwrapped(model)):
            raise InvalidInputError(
                "proven_exit: found one of another model, or of this one before modules of it were "
                "replaced; prove the exits of this one with softtrace.decoding.check_early_exit"
            )

    def check_resumable(self, depth: int) -> None:
        """Raise :class:`InvalidInputError` unless it was proven to continue after an exit."""
        if depth not in self.resumable:
            proven = ", ".join(map(str, sorted(self.resumable))) or "none"
            raise InvalidInputError(
                f"proven_exit: found one without a proof that the model continues after {depth} "
                f"layers (proven exit layers: {proven}); softtrace.decoding.check_cache "
                "gives it one"
            )


@torch.no_grad()
def check_early_exit(model: nn.Module) -> ProvenExit:
    """Prove that early exits exit early.

    transformers sets ``config.num_hidden_layers``; models whose forward does not look at it (GPT-2,
    GPT-NeoX, Falcon, OPT, ...) run all their layers and say nothing.

    Returns:
        The proof, for ``generate`` and ``check_cache``.

    Raises:
        UnsupportedModelError: The exit is ignored, or gives something else than the residual
            stream after that layer, normed and read by the head; or see
            :func:`softtrace.attach`.
    """
    instrument = attach_whatever_hooks(model)
    modules = decoder_layers(instrument)
    layers, name = len(modules), type(model).__name__
    if layers < 2:
        raise UnsupportedModelError(
            f"{name} has {layers} layer; an early exit needs two at least, so decode it plainly"
        )
    ids = some_ids(instrument, model)
    with dropout_off(model):
        streams, logits = _plain_run(model, modules, ids)
    allowed = tolerance(next(model.parameters()).dtype)
    for depth in {1, layers // 2, layers - 1}:
        with dropout_off(model):
            wanted = instrument.anatomy.readout.early(streams[depth - 1])
            with first_layers(model, depth):
                found = model(input_ids=ids, use_cache=False).logits
        if mismatch(found, wanted) > allowed:
            if mismatch(found, logits) <= allowed:
                raise UnsupportedModelError(
                    f"{name} runs all {layers} layers whatever config.num_hidden_layers says, so "
                    "assistant_early_exit would be ignored without a word; decode it plainly"
                )
            raise UnsupportedModelError(
                f"{name}: an exit after {depth} layers is not the residual stream there read by "
                f"the final norm and the head (mismatch {mismatch(found, wanted):.2g}, allowed "
                f"{allowed:.2g}); decode it plainly"
            )
    return ProvenExit(model, instrument)


def _plain_run(
    model: nn.Module, layers: Sequence[nn.Module], ids: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The residual stream after each layer, and the logits, of a run that is not recorded.

    Recorded attention adds up in another order. Over the layers of a trained model in bfloat16 this
    comes to a tenth of the logits, and would hide what is looked for.
    """
    streams: list[Tensor] = []

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        if (stream := first_tensor(output)) is not None:
            streams.append(stream)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(listen))
        return streams, model(input_ids=ids, use_cache=False).logits


def some_ids(instrument: Instrument, model: nn.Module) -> Tensor:
    """Six tokens, ``[1, 6]``, to compare two ways of running a model on."""
    ids = torch.arange(6, device=next(model.parameters()).device)[None]
    return ids % instrument.anatomy.vocabulary


@torch.no_grad()
def check_cache(proven_exit: ProvenExit, depths: Iterable[int] = ()) -> ProvenExit:
    """Prove that a model can continue from a cache that is cut, and from its first layers' states.

    Args:
        proven_exit: What was proven of the model, see :func:`check_early_exit`.
        depths: Exit layers to prove it for. With none it is tried at the first, at half of the
            layers and at all but one, as exits are, and holds for all.

    Returns:
        ``proven_exit`` with this proof too.

    Raises:
        UnsupportedModelError: The model cannot, or its logits are others then.
        InvalidInputError: An exit layer that is none, or modules of the model were replaced since
            its exits were proven.
    """
    model, instrument, depths = proven_exit.model, proven_exit.instrument, frozenset(depths)
    proven_exit.check_model(model)
    for depth in depths:
        check_exit_layer(depth, proven_exit.layers)
    ids, layers = some_ids(instrument, model), decoder_layers(instrument)
    name = type(model).__name__
    with dropout_off(model), running(f"{name} does not run with transformers' DynamicCache"):
        wanted = model(input_ids=ids, use_cache=False).logits[0, 3:]
        for depth in depths or {1, len(layers) // 2, len(layers) - 1}:
            parts = TwoParts(model, layers, depth)
            parts.whole(ids[:, :2])
            for place in (2, 5):  # the second is taken out again
                parts.first(ids[:, place : place + 1])
            parts.rest()
            parts.forget(1)
            for place in range(3, 6):
                parts.first(ids[:, place : place + 1])
            found = parts.rest()
            error, allowed = typical_mismatch(found, wanted), cache_tolerance(wanted.dtype)
            if error > allowed:
                raise UnsupportedModelError(
                    f"{name} says something else when it continues from a cache and from its first "
                    f"{depth} layers (mismatch {error:.2g}, allowed {allowed:.2g}); decode it with "
                    "model.generate"
                )
    proven = depths or frozenset(range(1, len(layers)))
    return replace(proven_exit, resumable=proven_exit.resumable | proven)


def decoder_layers(instrument: Instrument) -> list[nn.Module]:
    """The modules that a model's residual stream goes through, first to last."""
    return [modules.layer for modules in instrument.anatomy.layers]


def exit_layer_of(model: nn.Module) -> int:
    """The exit layer that the model's config recommends.

    Raises:
        InvalidInputError: It recommends none.
    """
    found = as_integer(getattr(getattr(model, "config", None), EXIT_FIELD, None))
    if found is None:
        raise InvalidInputError(
            f"exit_layer: found none, and the model's config has no {EXIT_FIELD} (softtrace fit "
            "and softtrace.decoding.recommend_exit write it; softtrace decode-bench measures every "
            "layer). Pass exit_layer"
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
    end = start + new_tokens
    for kind, limit in moving_rotations(counter(model)):
        if end > limit if kind == "dynamic" else start <= limit < end:
            raise UnsupportedModelError(
                f"{type(model).__name__} changes its rotary frequencies ({kind}) beyond {limit} "
                f"tokens, and this text would go from {start} to {end}: drafts would be checked "
                "with other frequencies than plain decoding uses. Keep it shorter or decode plainly"
            )


def moving_rotations(config: Any) -> list[tuple[str, int]]:
    """How rotary frequencies change with the length of a text, and beyond how many tokens.

    Args:
        config: of a causal language model of transformers.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    layouts = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    found = []
    for layout in layouts:
        kind = layout.get("rope_type")
        if kind in ("dynamic", "longrope"):
            field = "original_max_position_embeddings"
            limit: Any = layout.get(field) or getattr(config, field, None)
            found.append((kind, limit or config.max_position_embeddings))
    return found


def check_exit_layer(depth: int, layers: int) -> None:
    """Raise :class:`InvalidInputError` unless an exit layer is an integer from 1 to L - 1."""
    number = as_integer(depth)
    if number is None or not 1 <= number < layers:
        raise InvalidInputError(f"exit_layer: found {depth!r}, allowed 1 to {layers - 1}")
