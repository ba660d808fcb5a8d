"""Faster lossless decoding: a model drafts with its first layers and checks with all of them.

Self-speculation (LayerSkip, arXiv 2404.16710): after E layers the residual stream is read with the
model's own final norm and head. Drafts made so are checked by one run of the whole model, so the
output is that of plain greedy decoding, token for token (up to ties that rounding decides: a run
over several tokens and a run over one add up in different orders).

Two loops: transformers' own ``generate(assistant_early_exit=E)``, and :func:`speculate`, which
keeps one cache for drafting and checking and calls the model directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from softtrace.batch import check_least, check_range
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.families.proof import tolerance
from softtrace.families.refusals import running
from softtrace.families.sight import mismatch
from softtrace.instrument import attach
from softtrace.runs import dropout_off

EXIT_FIELD = "softtrace_exit_layer"
"""Field of a model's config that holds the recommended exit layer."""


@dataclass(frozen=True)
class Generation:
    """What a decoding loop wrote, and what it took.

    Attributes:
        tokens: ``[N]`` int64, the new tokens.
        drafted: tokens that were guessed.
        accepted: of them, how many the whole model agreed to.
        checks: runs of the whole model after the one over the prompt.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    checks: int

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def accepted_per_draft(self) -> float:
        """Accepted tokens a draft, which is a check."""
        return self.accepted / self.checks if self.checks else float("nan")


def _counter(model: nn.Module) -> Any:
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
    config = _counter(model)
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
    ids = torch.arange(6, device=next(model.parameters()).device)[None]
    ids = ids % instrument.anatomy.vocabulary
    recording = instrument.record(ids, keep_hidden=True, keep_attention=False)
    hidden = recording.hidden or ()
    allowed = tolerance(next(model.parameters()).dtype)
    for depth in {1, layers // 2, layers - 1}:
        with dropout_off(model), first_layers(model, depth):
            found = model(input_ids=ids, use_cache=False).logits
        with dropout_off(model):
            wanted = instrument.anatomy.readout.early(hidden[depth])
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


@torch.no_grad()
def check_cache(model: nn.Module) -> None:
    """Prove that a model can go on from a cache that grows and is cut.

    Raises:
        UnsupportedModelError: it cannot, or its logits are others then.
    """
    instrument = attach(model)
    ids = torch.arange(6, device=next(model.parameters()).device)[None]
    ids = ids % instrument.anatomy.vocabulary
    name, cache = type(model).__name__, DynamicCache()
    with dropout_off(model), running(f"{name} does not run with transformers' DynamicCache"):
        wanted = model(input_ids=ids, use_cache=False).logits[:, 3:]
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        _forget(cache.layers, 1)
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


def generate(
    model: Any,
    input_ids: Tensor,
    exit_layer: int | None = None,
    *,
    proven: bool = False,
    **options: Any,
) -> Tensor:
    """Greedy decoding by transformers' own loop with an early exit that was proven to be one.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[1, T]``; transformers' assisted loop takes one sequence.
        exit_layer: layers that draft, 1 to L - 1; None takes the one that the config recommends.
        proven: :func:`check_early_exit` has accepted the model and its layers already.
        options: of ``model.generate``.

    Returns:
        ``[1, T + N]``, prompt and new tokens.

    Raises:
        UnsupportedModelError: see :func:`check_early_exit`.
        InvalidInputError: an exit layer that is none, or several sequences.
    """
    depth = _checked(model, input_ids, exit_layer, proven)
    options = {"do_sample": False, "attention_mask": torch.ones_like(input_ids), **options}
    found: Tensor = model.generate(input_ids, assistant_early_exit=depth, **options)
    return found


def _checked(model: nn.Module, input_ids: Tensor, exit_layer: int | None, proven: bool) -> int:
    if proven and exit_layer is not None:
        return exit_layer
    attach(model).valid(input_ids)
    if len(input_ids) != 1:
        raise InvalidInputError(f"input_ids: found {len(input_ids)} sequences, allowed is one")
    layers = check_early_exit(model)
    depth = exit_layer_of(model) if exit_layer is None else exit_layer
    check_exit_layer(depth, layers)
    return depth


def check_exit_layer(depth: int, layers: int) -> None:
    """Raise :class:`InvalidInputError` unless an exit layer is an integer from 1 to L - 1."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth < layers:
        raise InvalidInputError(f"exit_layer: found {depth!r}, allowed 1 to {layers - 1}")


def _ends(model: nn.Module, eos_token_id: int | None) -> set[int]:
    if eos_token_id is not None:
        return {eos_token_id}
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(own) if isinstance(own, list) else set() if own is None else {own}


@torch.inference_mode()
def greedy(
    model: nn.Module, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None
) -> Generation:
    """Plain greedy decoding by the same direct calls as :func:`speculate`: what it is timed by.

    Args:
        model, input_ids, max_new_tokens, eos_token_id: see :func:`speculate`.
    """
    cache, ends = DynamicCache(), _ends(model, eos_token_id)
    tokens = [_next(model, input_ids, cache)]
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        tokens.append(_next(model, input_ids.new_tensor([tokens[-1:]]), cache))
    return Generation(input_ids.new_tensor(tokens), 0, 0, len(tokens) - 1)


def _next(model: nn.Module, input_ids: Tensor, cache: DynamicCache) -> int:
    logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
    return int(logits[0, -1].argmax())


@torch.inference_mode()
def speculate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    exit_layer: int | None = None,
    max_new_tokens: int = 64,
    draft_tokens: int = 6,
    confidence: float = 0.5,
    eos_token_id: int | None = None,
    proven: bool = False,
) -> Generation:
    """Greedy decoding, drafted by the first layers and checked by all, with one cache for both.

    Args:
        model: a causal language model of transformers, in eval mode.
        input_ids: ``[1, T]``, no padding.
        exit_layer: layers that draft, 1 to L - 1; None takes the one that the config recommends.
        max_new_tokens: how many to write at most, >= 1.
        draft_tokens: how many to guess at most before a check, >= 1.
        confidence: a guess with less probability than this is the last of its draft, in [0, 1].
        eos_token_id: ends the text; None takes the generation config's.
        proven: :func:`check_early_exit` and :func:`check_cache` have accepted the model already.

    Raises:
        UnsupportedModelError: see :func:`check_early_exit` and :func:`check_cache`.
        InvalidInputError: a number outside its range, several sequences, or a model in train mode.
    """
    check_least("max_new_tokens", max_new_tokens, 1)
    check_least("draft_tokens", draft_tokens, 1)
    check_range("confidence", confidence, 0, 1)
    if model.training:
        raise InvalidInputError("model: found one in train mode; call model.eval() first")
    depth = _checked(model, input_ids, exit_layer, proven)
    if not proven:
        check_cache(model)
    ends, cache = _ends(model, eos_token_id), DynamicCache()
    tokens = [_next(model, input_ids, cache)]
    drafted = accepted = checks = 0
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        room = min(draft_tokens, max_new_tokens - len(tokens) - 1)
        draft = _draft(model, tokens[-1], cache, depth, room, confidence, ends) if room else []
        read = input_ids.new_tensor([[tokens[-1], *draft]])
        logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits
        best: list[int] = logits[0].argmax(-1).tolist()
        right = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        _forget(cache.layers, len(draft) - right)
        drafted, accepted, checks = drafted + len(draft), accepted + right, checks + 1
        tokens += [*draft[:right], best[right]]
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        tokens = tokens[: end + 1]
    return Generation(input_ids.new_tensor(tokens), drafted, accepted, checks)


def _draft(
    model: nn.Module,
    token: int,
    cache: DynamicCache,
    depth: int,
    room: int,
    confidence: float,
    ends: set[int],
) -> list[int]:
    """Guess up to ``room`` tokens with the first layers; the cache is left as it was found."""
    draft: list[int] = []
    with first_layers(model, depth):
        while len(draft) < room:
            read = torch.tensor([[token]], device=next(model.parameters()).device)
            logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits[0, -1]
            token = int(logits.argmax())
            draft.append(token)
            sure = not confidence or float(logits.float().softmax(-1)[token]) >= confidence
            if not sure or token in ends:
                break
    _forget(cache.layers[:depth], len(draft))
    return draft


def _forget(layers: Sequence[Any], tokens: int) -> None:
    """Take the newest tokens out of layers of a cache."""
    if tokens:
        for layer in layers:
            layer.crop(-tokens)


def expected_speedup(acceptance: float, draft_cost: float, draft_tokens: int) -> float:
    """Tokens a second of self-speculation relative to plain decoding, if guesses are independent.

    A draft of k tokens is followed by one check that costs what one plain token costs; it yields
    (1 - a^(k+1)) / (1 - a) tokens (LayerSkip, section 4.3; Leviathan et al., arXiv 2211.17192).

    Args:
        acceptance: a, probability that a guess is right, in [0, 1].
        draft_cost: time of one guess relative to one plain token, > 0.
        draft_tokens: k, >= 0.
    """
    written = sum(acceptance**power for power in range(draft_tokens + 1))
    return written / (1 + draft_cost * draft_tokens)


def best_exit(
    acceptance: dict[int, float], draft_cost: dict[int, float], most: int = 12
) -> tuple[int, int, float]:
    """The exit layer and draft length with the highest :func:`expected_speedup`.

    Args:
        acceptance, draft_cost: of each exit layer.
        most: draft tokens to consider.

    Returns:
        Exit layer, draft tokens (at least 1) and the speed-up, which can be below 1.
    """
    return max(
        (
            (layer, count, expected_speedup(share, draft_cost[layer], count))
            for layer, share in acceptance.items()
            for count in range(1, most + 1)
        ),
        key=lambda found: found[2],
    )
