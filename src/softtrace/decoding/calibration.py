"""How sure an exit has to be, chosen on held-out text for an agreement that is asked for.

An exit's probability is not how often it is right: after training with exits it is often too sure.
So what a probability is worth is counted on text that neither training nor the result is read from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrace.checks import check_range
from softtrace.decoding.confidence import surest
from softtrace.decoding.exit_checks import ProvenExit, check_early_exit, check_exit_layer
from softtrace.decoding.split_model import exit_after
from softtrace.errors import InvalidInputError
from softtrace.model.devices import device_of_module
from softtrace.model.state import dropout_off

LEAST = 30
"""Tokens that a bound has to be judged on at least."""


@dataclass(frozen=True)
class CalibratedConfidence:
    """A bound on an exit's probability, and what it came to on the text it was chosen on.

    Attributes:
        confidence: Tokens whose exit is at least as sure are taken.
        agreement: Share of these that the whole model agrees to.
        share: Of all tokens that are taken.
    """

    confidence: float
    agreement: float
    share: float


@torch.no_grad()
def calibrated_confidence(
    model: nn.Module,
    input_ids: Tensor,
    *,
    exit_layer: int,
    agreement: float,
    each: bool = False,
    proven_exit: ProvenExit | None = None,
) -> CalibratedConfidence:
    """The least confidence of an exit with which it agrees with the whole model as often as asked.

    Args:
        model: A causal language model of transformers.
        input_ids: ``[N, T]`` int64, held-out text without padding.
        exit_layer: 1 to L - 1.
        agreement: Share of tokens, in (0, 1], at which the exit's most likely token is the whole
            model's.
        each: Ask it of the least sure token that is taken, by a rate that falls with confidence
            (isotonic regression): for drafts, which continue as long as the next guess is worth it.
            Otherwise of all that are taken together: for :func:`softtrace.decoding.exit_early`.
        proven_exit: Of the model; None proves it here.

    Raises:
        UnsupportedModelError: Its early exits are no exits.
        InvalidInputError: A number outside its range, ids of another shape, or no confidence
            reaches the agreement on at least :data:`LEAST` tokens of this text.
    """
    proven_exit = check_early_exit(model) if proven_exit is None else proven_exit
    proven_exit.check_model(model)
    check_exit_layer(exit_layer, proven_exit.layers)
    sure, right, device = [], [], device_of_module(model)
    proven_exit.instrument.batch(input_ids.to(device))
    with dropout_off(model):
        for row in input_ids:
            ids = row[None].to(device)
            best = model(input_ids=ids, use_cache=False).logits[0].argmax(-1)
            with exit_after(model, exit_layer):
                logits = model(input_ids=ids, use_cache=False).logits[0]
            sure += surest(logits).tolist()
            right += (logits.argmax(-1) == best).tolist()
    return least_confidence(sure, right, agreement, each)


def least_confidence(
    sure: Sequence[float], right: Sequence[bool], agreement: float, each: bool = False
) -> CalibratedConfidence:
    """See :func:`calibrated_confidence`; for every token how sure an exit was, and if right."""
    check_range("agreement", agreement, 0, 1)
    levels, level_of = torch.unique(torch.tensor(sure, dtype=torch.float64), return_inverse=True)
    counts = torch.bincount(level_of).flip(0)  # the surest first; equals are taken together
    hits = torch.bincount(level_of, torch.tensor(right, dtype=torch.float64)).flip(0)
    taken = counts.cumsum(0)
    shares = hits.cumsum(0) / taken
    rates = _falling(hits.tolist(), counts.tolist()) if each else shares.tolist()
    enough = [place for place, count in enumerate(taken.tolist()) if count >= LEAST]
    reaching = [place for place in enough if rates[place] >= agreement]
    if not reaching:
        reached = max((rates[place] for place in enough), default=0.0)
        raise InvalidInputError(
            f"agreement: found {agreement}, which no confidence of this exit reaches on at least "
            f"{LEAST} of {len(sure)} tokens (most: {reached:.3f}); ask for less, take a deeper "
            "exit, or give more text"
        )
    last = reaching[-1]
    confidence = float(levels.flip(0)[last])
    return CalibratedConfidence(confidence, float(shares[last]), int(taken[last]) / len(sure))


def _falling(hits: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The nearest rates of hits that never rise (pool adjacent violators)."""
    pools: list[tuple[float, int, int]] = []  # hits, tokens, levels
    for hit, count in zip(hits, counts, strict=True):
        pool = (hit, count, 1)
        while pools and pools[-1][0] / pools[-1][1] <= pool[0] / pool[1]:
            before = pools.pop()
            pool = (pool[0] + before[0], pool[1] + before[1], pool[2] + before[2])
        pools.append(pool)
    return [hit / count for hit, count, levels in pools for _ in range(levels)]
