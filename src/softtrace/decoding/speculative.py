"""Faster lossless decoding: a model drafts with its first layers and checks with all of them.

Self-speculation (LayerSkip, arXiv 2404.16710): after E layers the residual stream is read with the
model's own final norm and head. Drafts made so are checked by one run of the other layers over all
of them, so the output is that of plain greedy decoding, token for token (up to ties that rounding
decides: a run over several tokens and a run over one add up in different orders).

Two loops: transformers' own ``generate(assistant_early_exit=E)``, whose checks run all layers, and
:func:`speculate`, which keeps one cache, continues from what the draft computed, and calls the
model directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from softtrace.checks import as_integer, check_least, check_range
from softtrace.decoding.confidence import surest
from softtrace.decoding.exit_checks import (
    ProvenExit,
    check_cache,
    check_early_exit,
    check_exit_layer,
    decoder_layers,
    exit_layer_of,
    refuse_moving_rotations,
)
from softtrace.decoding.greedy_choice import GreedyChoice, greedy_choice, option_of, refuse_options
from softtrace.decoding.plain_reading import PlainReader
from softtrace.decoding.split_model import TwoParts, counter, first_layers
from softtrace.errors import InvalidInputError
from softtrace.graph.batch import check_is_tensor
from softtrace.model.wrappers import checked_module
from softtrace.tracing.attach import attach_whatever_hooks

_USUAL = 20  # new tokens that generate writes if it is not told


@dataclass(frozen=True)
class Generation:
    """What a decoding loop wrote, and what it took.

    Attributes:
        tokens: ``[N]`` int64, the new tokens.
        drafted: Tokens that were guessed and read by a check. An unsure guess, which ends its
            draft, is not: the check says itself what comes there.
        accepted: How many of them the whole model agreed to.
        checks: Runs of the layers above the exit after the one over the prompt, of all layers
            where nothing was drafted.
        reached: How many guesses came after right ones alone, or first: a wrong one ends its draft,
            and those behind it were made in vain.
    """

    tokens: Tensor
    drafted: int
    accepted: int
    checks: int
    reached: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def acceptance_each(self) -> float:
        """Share of right ones of the guesses that were reached; NaN if there were none."""
        return self.accepted / self.reached if self.reached else float("nan")

    @property
    def accepted_per_draft(self) -> float:
        """Accepted tokens a draft; the last one of a text is cut to what is left of it."""
        return self.accepted / self.checks if self.drafted else float("nan")


def generate(
    model: Any,
    input_ids: Tensor,
    exit_layer: int | None = None,
    *,
    proven_exit: ProvenExit | None = None,
    **options: Any,
) -> Tensor:
    """Greedy decoding by transformers' own loop with an early exit that was proven to be one.

    Args:
        model: A causal language model of transformers.
        input_ids: ``[1, T]``; transformers' assisted loop takes one sequence.
        exit_layer: Layers that draft, 1 to L - 1; None takes the one that the config recommends.
        proven_exit: What :func:`softtrace.decoding.check_early_exit` returned for the model; None
            proves it anew for every text.
        options: Options of ``model.generate``. What ends a text (``stopping_criteria``,
            ``stop_strings``) is asked again of every token: transformers' assisted loop asks once a
            draft, and writes past the end. Options that it does not say are the generation
            config's, but for the cache: it takes one that can be cut.

    Returns:
        ``[1, T + N]``, prompt and new tokens.

    Raises:
        UnsupportedModelError: The model has no exits, or rotary frequencies change over the
            text; see :mod:`softtrace.decoding.exit_checks`.
        InvalidInputError: An exit layer that is none, several sequences, a ``proven_exit`` of
            another model, ``stop_strings`` without a ``tokenizer``, or an option that a draft
            cannot honour (``num_beams``, ``guidance_scale``, ``return_dict_in_generate``, ...).
    """
    if options.get("return_dict_in_generate"):
        raise InvalidInputError(
            "return_dict_in_generate: found True, allowed is False: tokens are returned and "
            "nothing else. Leave it out, or decode with model.generate"
        )
    if "assistant_early_exit" in options:
        raise InvalidInputError(
            f"assistant_early_exit: found {options['assistant_early_exit']!r}, which is "
            "exit_layer here; pass that"
        )
    _, depth = proven_exit_of(model, input_ids, exit_layer, proven_exit)
    refuse_options(model, options)
    start, new_tokens = input_ids.shape[1], option_of(model, options, "max_new_tokens")
    if new_tokens is None:
        new_tokens = (option_of(model, options, "max_length") or start + _USUAL) - start
    refuse_moving_rotations(model, start, new_tokens)
    mask = torch.ones_like(input_ids)
    options = {"do_sample": False, "use_cache": True, "attention_mask": mask, **options}
    criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or ())
    strings, tokenizer = option_of(model, options, "stop_strings"), options.pop("tokenizer", None)
    if strings:
        if tokenizer is None:
            raise InvalidInputError("stop_strings: found no tokenizer beside them; pass tokenizer")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    # Time that is up now was not up then.
    asked = [each for each in criteria if not isinstance(each, MaxTimeCriteria)]

    def ends(text: Tensor) -> bool:
        return any(bool(each(text, None)) for each in asked)

    if asked and options.get("streamer") is not None:
        options["streamer"] = _UpToTheEnd(options["streamer"], ends)
    # transformers leaves the model cut off where its draft is interrupted.
    with first_layers(model, counter(model).num_hidden_layers), _without_own(model):
        found: Tensor = model.generate(
            input_ids, assistant_early_exit=depth, stopping_criteria=criteria,
            **{**options, "stop_strings": None, "return_dict_in_generate": False},
        )  # fmt: skip
    for end in range(input_ids.shape[1] + 1, found.shape[1]):
        if ends(found[:, :end]):
            return found[:, :end]
    return found


class _UpToTheEnd(BaseStreamer):
    """Hands on a text up to where it ends, which transformers' assisted loop writes past."""

    def __init__(self, streamer: Any, ends: Callable[[Tensor], bool]) -> None:
        self.streamer, self.ends, self.ended = streamer, ends, False
        self.text: Tensor | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt ``[1, T]`` first, then the tokens of each draft."""
        if self.text is None:
            self.text = value
            self.streamer.put(value)
            return
        for token in value.reshape(-1, 1):
            if self.ended:
                return
            self.text = torch.cat((self.text, token[None]), dim=1)
            self.streamer.put(token)
            self.ended = self.ends(self.text)

    def end(self) -> None:
        """Nothing follows."""
        self.streamer.end()


@contextmanager
def _without_own(model: Any) -> Iterator[None]:
    """Hide of a model's config what its draft cannot take.

    For stop strings it would look for a tokenizer, and it is handed its cache.
    """
    own = model.generation_config
    kept = own.stop_strings, own.cache_implementation
    try:
        own.stop_strings = own.cache_implementation = None
        yield
    finally:
        own.stop_strings, own.cache_implementation = kept


def proven_exit_of(
    model: nn.Module, input_ids: Tensor, exit_layer: int | None, proven_exit: ProvenExit | None
) -> tuple[ProvenExit, int]:
    """What is proven of the model's exits, here unless it was before, and the exit to take."""
    check_one_text(input_ids)
    if proven_exit is None:
        attach_whatever_hooks(model).batch(input_ids)
        proven_exit = check_early_exit(model)
    else:
        proven_exit.check_model(model)
        proven_exit.instrument.batch(input_ids)
    depth = exit_layer_of(model) if exit_layer is None else exit_layer
    check_exit_layer(depth, proven_exit.layers)
    return proven_exit, depth


def continued_exit_of(
    model: nn.Module, input_ids: Tensor, exit_layer: int | None, proven_exit: ProvenExit | None
) -> tuple[ProvenExit, int]:
    """:func:`proven_exit_of`, where it is also proven that the model continues after the exit."""
    found, depth = proven_exit_of(model, input_ids, exit_layer, proven_exit)
    if proven_exit is None:
        found = check_cache(found, (depth,))
    found.check_resumable(depth)
    return found, depth


def check_one_text(input_ids: Tensor) -> None:
    """Raise :class:`InvalidInputError` for anything but one text of at least one token."""
    check_is_tensor(input_ids)
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
        found = tuple(input_ids.shape)
        raise InvalidInputError(
            f"input_ids: found {found}, allowed is [1, T] with T from 1; pass one text at a time, "
            "with at least one token"
        )


Ends = int | Sequence[int] | Tensor | None


def ends_of(model: nn.Module, eos_token_id: Ends) -> set[int]:
    """Tokens that end a text; None takes the generation config's.

    Raises:
        InvalidInputError: what is no id of a token.
    """
    if eos_token_id is None:
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos_token_id is None:
        return set()
    if isinstance(eos_token_id, Tensor):  # as generate takes it
        eos_token_id = eos_token_id.reshape(-1).tolist()
    ends = eos_token_id if isinstance(eos_token_id, Iterable) else [eos_token_id]
    numbers = {as_integer(end) for end in ends}
    if None in numbers:
        raise InvalidInputError(
            f"eos_token_id: found {eos_token_id!r}, allowed are ids: of a text's end that is "
            "tokenizer.eos_token_id, of other tokens tokenizer.convert_tokens_to_ids(...)"
        )
    return {number for number in numbers if number is not None}


@torch.inference_mode()
def greedy(
    model: nn.Module, input_ids: Tensor, max_new_tokens: int, eos_token_id: Ends = None
) -> Generation:
    """Plain greedy decoding by the same direct calls as :func:`speculate`: what it is timed by.

    Where a model drops its cache because its rotary frequencies change (Phi-3 and Phi-MoE with
    'longrope', beyond ``original_max_position_embeddings``), the text is read anew.

    Args:
        model, input_ids, max_new_tokens, eos_token_id: See :func:`speculate`.

    Raises:
        UnsupportedModelError: The model keeps more of a text than keys and values of its tokens, as
            hybrid and state-space models do.
        InvalidInputError: A number outside its range, several sequences or an empty one, a model in
            train mode, or a generation config that these calls cannot honour.
    """
    check_decoding(model, max_new_tokens)
    check_one_text(input_ids)
    reader, ends = PlainReader(model), ends_of(model, eos_token_id)
    choice = greedy_choice(model, input_ids, max_new_tokens, ends)
    tokens: list[int] = []
    read = input_ids
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
        logits = reader.read(read)
        tokens.append(int(choice.scores(logits[None], tokens).argmax()))
        read = input_ids.new_tensor([tokens[-1:]])
    return Generation(input_ids.new_tensor(tokens), 0, 0, len(tokens) - 1)


def check_decoding(model: nn.Module, max_new_tokens: int) -> None:
    """Raise :class:`InvalidInputError` in train mode, or where nothing is to be written."""
    check_least("max_new_tokens", max_new_tokens, 1)
    if checked_module(model).training:
        raise InvalidInputError("model: found one in train mode; call model.eval() first")


@torch.inference_mode()
def speculate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    exit_layer: int | None = None,
    max_new_tokens: int = 64,
    draft_tokens: int = 6,
    confidence: float = 0.5,
    eos_token_id: Ends = None,
    proven_exit: ProvenExit | None = None,
) -> Generation:
    """Greedy decoding, drafted by the first layers and checked by the others, over one cache.

    Of a draft whose guesses are all right the last is what the check would have written, so that
    drafts of one guess are plain decoding; what follows it is the next draft's. While it runs, the
    model is cut off and put together again: no other thread may use it.

    What the model's generation config changes about greedy decoding (``repetition_penalty``,
    ``no_repeat_ngram_size``, ``suppress_tokens``, ``min_new_tokens``, ...) is applied to guesses
    and checks, so that the text is the one of ``model.generate(do_sample=False)``.

    Args:
        model: A causal language model of transformers, in eval mode.
        input_ids: ``[1, T]``, no padding.
        exit_layer: Layers that draft, 1 to L - 1; None takes the one that the config recommends.
        max_new_tokens: How many to write at most, >= 1.
        draft_tokens: Tokens that a check writes at most, >= 1; one less is guessed before it.
        confidence: A draft ends where the exit's most likely token has less probability than this,
            in [0, 1], whatever the generation config makes of it.
        eos_token_id: One or several that end the text; None takes the generation config's.
        proven_exit: What :func:`softtrace.decoding.check_cache` returned for the model; None proves
            it anew for every text. What depends on the text is checked all the same.

    Raises:
        UnsupportedModelError: The model has no exits or no cache that can be cut, or rotary
            frequencies change; see :mod:`softtrace.decoding.exit_checks`.
        InvalidInputError: A number outside its range, several sequences, a model in train mode,
            a ``proven_exit`` of another model or without a proof for this exit layer, or a
            generation config that a draft cannot honour (``num_beams``, ``guidance_scale``,
            ``stop_strings``, ...).
    """
    check_decoding(model, max_new_tokens)
    check_least("draft_tokens", draft_tokens, 1)
    check_range("confidence", confidence, 0, 1)
    found, depth = continued_exit_of(model, input_ids, exit_layer, proven_exit)
    refuse_moving_rotations(model, input_ids.shape[1], max_new_tokens)
    ends = ends_of(model, eos_token_id)
    choice = greedy_choice(model, input_ids, max_new_tokens, ends)
    drafted = accepted = checks = reached = 0
    parts = TwoParts(model, decoder_layers(found.instrument), depth)
    tokens = [int(choice.scores(parts.whole(input_ids)[None], ()).argmax())]
    while len(tokens) < max_new_tokens and tokens[-1] not in ends:
        room = min(draft_tokens, max_new_tokens - len(tokens))
        draft = _draft(parts, choice, tokens, room, confidence, ends)
        scores = choice.scores(parts.rest(), tokens + draft)
        best: list[int] = scores.argmax(-1).tolist()
        right = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        written = best[: right + 1]  # the guesses that are right, and what comes after them
        parts.forget(len(draft) - right)
        drafted, accepted, checks = drafted + len(draft), accepted + right, checks + 1
        reached += min(len(written), len(draft))
        tokens += written  # an end can only be the last
    return Generation(input_ids.new_tensor(tokens), drafted, accepted, checks, reached)


def _draft(
    parts: TwoParts,
    choice: GreedyChoice,
    written: list[int],
    room: int,
    confidence: float,
    ends: set[int],
) -> list[int]:
    """Guess tokens after those ``written`` with the first layers, of which a check writes ``room``.

    The check says itself what comes after the last guess, after a text's end nothing.
    """
    draft: list[int] = []
    while True:
        tokens = written + draft
        last = choice.prompt.new_tensor([tokens[-1:]])
        if len(draft) == room - 1:
            parts.follow(last)
            return draft
        logits = parts.first(last)
        guess = int(choice.scores(logits[None], tokens)[0].argmax())
        sure = not confidence or float(surest(logits)) >= confidence
        if not sure or guess in ends:
            return draft
        draft.append(guess)
