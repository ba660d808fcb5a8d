"""How a model should draft: exit layer, draft length and confidence, chosen by replay.

A text that the model wrote says of every token which exits would have guessed it, and how sure they
were. So what self-speculation would have done to write it can be replayed without the model, for
any way to draft, and be timed by what a guess and a check cost. Unlike the formula for independent
guesses (Leviathan et al., arXiv 2211.17192), a replay knows that wrong guesses come in clusters,
and what it is worth to stop where an exit is unsure.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Confidences that are considered unless one is given."""
LONGEST = 12
"""Draft tokens that are considered at most unless a number is given."""


@dataclass(frozen=True)
class Guesses:
    """What the exits of a model said about a text that the whole model wrote.

    Attributes:
        right: for each of L - 1 exits and N tokens, whether the exit's most likely token is the one
            that was written.
        sure: likewise, the probability of the exit's own most likely token.
    """

    right: Sequence[Sequence[bool]]
    sure: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Drafting:
    """A way to draft, and what a replay says of it.

    Attributes:
        exit_layer: layers that draft.
        draft_tokens: tokens that a check writes at most.
        confidence: a guess with less probability ends its draft.
        speedup: tokens a second over plain decoding's; below 1 where it does not pay.
        drafted, accepted, checks: see :class:`softtrace.decoding.Generation`.
    """

    exit_layer: int
    draft_tokens: int
    confidence: float
    speedup: float
    drafted: int
    accepted: int
    checks: int


def replay(
    texts: Sequence[Guesses],
    exit_layer: int,
    draft_tokens: int,
    confidence: float,
    draft_cost: float,
    check_cost: Sequence[float],
    head_cost: float = 0.0,
) -> Drafting:
    """What :func:`softtrace.decoding.speculate` would have done to write these texts.

    Accepted guesses and checks are exact, up to ties that rounding decides. How long a draft goes
    on after a wrong guess is not known, since that text was never written: it ends where it would
    on the written one.

    Args:
        texts: what the exits said about each.
        exit_layer: layers that draft, 1 to L - 1.
        draft_tokens: tokens that a check writes at most, >= 1.
        confidence: a guess with less probability ends its draft, in [0, 1].
        draft_cost: time of one guess relative to one plain token.
        check_cost: time of a check over 1, 2, ... tokens likewise, of as many as ``draft_tokens``
            and the texts allow.
        head_cost: the part of ``draft_cost`` that choosing a token takes. The last token of a
            draft is read without it, as nothing is guessed after it.
    """
    plain = drafted = accepted = checks = 0
    spent = 0.0
    for text in texts:
        right, sure = text.right[exit_layer - 1], text.sure[exit_layer - 1]
        done, total = 1, len(right)  # the first token comes with the prompt
        plain += total - done
        while done < total:
            most = min(draft_tokens, total - done) - 1  # the check writes one token itself
            guesses = hits = 0
            while guesses < most:
                place = done + guesses
                if confidence and not sure[place] >= confidence:
                    break
                hits += hits == guesses and right[place]
                guesses += 1
            drafted, accepted, checks = drafted + guesses, accepted + hits, checks + 1
            spent += check_cost[guesses] + draft_cost * (guesses + 1)
            spent -= head_cost * (guesses == most)
            done += hits + 1
    speedup = plain / spent if spent else float("nan")
    return Drafting(exit_layer, draft_tokens, confidence, speedup, drafted, accepted, checks)


def best_drafting(
    texts: Sequence[Guesses],
    layers: Iterable[int],
    draft_cost: Mapping[int, float],
    check_cost: Mapping[int, Sequence[float]],
    draft_tokens: int | None = None,
    confidence: float | None = None,
    head_cost: float = 0.0,
) -> Drafting:
    """The way to draft that :func:`replay` finds fastest, the shallowest and shortest of equals.

    Args:
        texts: see :func:`replay`.
        layers: exits to consider.
        draft_cost, check_cost: of each of them.
        draft_tokens: tokens that a check writes at most; None considers all that a check has a
            cost of.
        confidence: None considers :data:`CONFIDENCES`.
        head_cost: see :func:`replay`.
    """
    confidences = CONFIDENCES if confidence is None else (confidence,)
    ways = (
        replay(texts, layer, count, each, draft_cost[layer], check_cost[layer], head_cost)
        for layer in layers
        for count in ([draft_tokens] if draft_tokens else range(1, 1 + len(check_cost[layer])))
        for each in confidences
    )
    return max(ways, key=lambda way: way.speedup)


def check_costs(
    draft_cost: Mapping[int, float], whole_cost: Sequence[float]
) -> dict[int, list[float]]:
    """Time of a check over 1, 2, ... tokens by the layers above each exit.

    Of a run over so many tokens, what the layers below the exit take is left out: their share of
    what layers take, which is all but what a run takes besides (embedding, norm, head, calls). That
    is where the line through the cost of guesses and of a token begins.

    Args:
        draft_cost: for exits after 1 to L - 1 layers, time of a guess relative to a plain token.
        whole_cost: time of the whole model over 1, 2, ... tokens likewise.
    """
    layers = 1 + len(draft_cost)
    points = {**draft_cost, layers: whole_cost[0]}
    _, start = statistics.linear_regression(list(points), list(points.values()))
    besides = min(1.0, max(0.0, start))
    return {
        layer: [besides + (cost - besides) * (1 - layer / layers) for cost in whole_cost]
        for layer in draft_cost
    }
