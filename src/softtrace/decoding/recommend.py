"""Which early exit decodes fastest, judged by a replay of what the exits would have guessed.

The residual stream after each layer is read with the model's own final norm and head, as
self-speculation does (LayerSkip, arXiv 2404.16710).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softtrace.decoding.confidence import surest
from softtrace.decoding.exit_checks import EXIT_FIELD, check_early_exit
from softtrace.decoding.greedy_choice import GreedyChoice
from softtrace.decoding.replay import LONGEST, Guesses, best_drafting
from softtrace.density.exits import hidden_states
from softtrace.errors import InvalidInputError
from softtrace.model.devices import device_of_module
from softtrace.model.state import dropout_off, uncompiled
from softtrace.tracing.attach import attach_whatever_hooks
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.recording import Recording

_LEAST = 8  # tokens of a row to judge exits by: half of it is replayed


@torch.no_grad()
def guesses_of(
    instrument: Instrument,
    recording: Recording,
    explained: slice,
    written: Tensor,
    row: int = 0,
    choice: GreedyChoice | None = None,
) -> Guesses:
    """What the exit after each layer but the last guesses of one sequence.

    Args:
        instrument: of the model.
        recording: made with ``keep_hidden=True``.
        explained: positions to look at.
        written: ``[B, T']`` ids, what follows each of them.
        row: which sequence.
        choice: what the generation config changes, where the positions begin at the end of its
            prompt; None takes the logits as they are, as ``sure`` always does.
    """
    right, sure = [], []
    for depth, hidden in enumerate(hidden_states(recording)[1:-1], start=1):
        logits = instrument.read_exit(hidden[row, explained], depth)
        sure.append(surest(logits).tolist())
        if choice is not None:
            logits = choice.scores(logits, written[row, :-1].tolist())
        right.append((logits.argmax(-1) == written[row]).tolist())
    return Guesses(right, sure)


@torch.no_grad()
def recommended_exit(model: nn.Module, blocks: Tensor, batch_size: int = 8) -> int:
    """The exit layer that should decode fastest, judged on a text.

    By replay (:mod:`softtrace.decoding.replay`) of the second half of every block as if the
    model had written it, with a guess that costs its share of the layers and a check that costs the
    others; ``softtrace decode-bench`` measures both on what the model writes itself.

    Args:
        model: a causal language model with at least two layers.
        blocks: ``[N, T]`` ids.
        batch_size: blocks a forward.
    """
    instrument, texts = attach_whatever_hooks(model), []
    device, explained = device_of_module(model), slice(blocks.shape[1] // 2, None)
    for ids in torch.split(blocks, batch_size):
        batch = instrument.batch(ids.to(device))
        recording = instrument.record(batch, keep_hidden=True, keep_attention=False)
        said = recording.logits[:, explained].argmax(-1)
        texts += [
            guesses_of(instrument, recording, explained, said, row) for row in range(len(ids))
        ]
    layers = len(instrument.anatomy.layers)
    costs = {layer: layer / layers for layer in range(1, layers)}
    checks = {layer: (1 - cost,) * LONGEST for layer, cost in costs.items()}
    return best_drafting(texts, costs, costs, checks).exit_layer


GATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences that a gated exit is reported for."""


def gated_exits(texts: Sequence[Guesses], confidence: float) -> tuple[float, float]:
    """Stop at the first layer whose exit is sure enough: mean layers used, share of tokens right.

    Not lossless: a sure exit can be wrong. Source: CALM (arXiv 2207.07061), softmax response.

    Args:
        texts: what the exits said about each.
        confidence: the least probability of the exit's most likely token, in [0, 1].
    """
    used, right = [], []
    for text in texts:
        whole = len(text.sure) + 1
        for sure, agrees in zip(
            zip(*text.sure, strict=True), zip(*text.right, strict=True), strict=True
        ):
            depth = next((d for d, each in enumerate(sure, 1) if each >= confidence), whole)
            used.append(depth)
            right.append(depth == whole or agrees[depth - 1])
    return statistics.mean(used), statistics.mean(right)


def recommend_exit(model: nn.Module, input_ids: Tensor) -> int:
    """Write into the model's config which early exit should decode it fastest.

    What ``softtrace fit`` does at its end, for models that were trained otherwise;
    ``save_pretrained`` keeps it, and :func:`softtrace.decoding.speculate` and
    :func:`softtrace.decoding.generate` take it. Judged by a replay of the second half of every row,
    with costs in proportion to layers; ``softtrace decode-bench`` measures them, on what the model
    writes itself.

    Args:
        model: A causal language model of transformers with at least two layers, in either mode.
        input_ids: ``[N, T]`` int64, text like that to be written, without padding; T at least 8.

    Returns:
        The exit layer, 1 to L - 1, as ``model.config.softtrace_exit_layer`` has it now.

    Raises:
        UnsupportedModelError: Its early exits are no exits.
        InvalidInputError: Ids have another shape, or lie outside the vocabulary.
    """
    if input_ids.dim() != 2 or not len(input_ids) or input_ids.shape[1] < _LEAST:
        raise InvalidInputError(
            f"input_ids: found {tuple(input_ids.shape)}, allowed is [N, T] with N at least 1 and "
            f"T at least {_LEAST}"
        )
    with dropout_off(model), uncompiled(model):
        check_early_exit(model)
        layer = recommended_exit(model, input_ids)
    setattr(model.config, EXIT_FIELD, layer)
    return layer
