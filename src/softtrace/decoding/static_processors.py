"""Logits processors of transformers for texts of different lengths, by operations of fixed shapes.

transformers hands a processor a text of just the right length. Here a text lies in a tensor with
room for more, and the places of a draft are processed at once, each by what stands before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from softtrace.decoding.greedy_choice import OF_LOGITS
from softtrace.errors import InvalidInputError


@dataclass(frozen=True)
class Places:
    """Where the tokens stand that scores are for.

    Attributes:
        tokens: ``[B, C]`` int64, texts, guesses included, and room behind them.
        start: ``[B, 1]`` int64, the position of the first of N tokens that follow each other.
        prompt: ``[B, 1]`` int64, tokens of the prompt.
    """

    tokens: Tensor
    start: Tensor
    prompt: Tensor

    def ends(self, count: int) -> list[Tensor]:
        """How long the text before each of so many places is, ``[B, 1]`` each."""
        return [self.start + place for place in range(count)]


StaticProcessor = Callable[[Tensor, Places], Tensor]
"""Changes scores ``[B, N, V]`` float32."""


def static_processors(processors: Sequence[Any], other: str) -> list[StaticProcessor]:
    """The same processors, in their order, for :class:`softtrace.decoding.static_steps.Steps`.

    Args:
        processors: of transformers.
        other: what to decode with instead, for the message.

    Raises:
        InvalidInputError: one that is not known here, by name.
    """
    found: list[StaticProcessor] = []
    for processor in processors:
        kind = type(processor)
        if kind in OF_LOGITS:
            found.append(_OfLogits(processor))
        elif kind in _OF_THE_TEXT and getattr(processor, "prompt_ignore_length", None) is None:
            found.append(_OF_THE_TEXT[kind](processor))
        else:
            raise InvalidInputError(
                f"model.generation_config: found one that asks for {kind.__name__}, which steps of "
                f"fixed shapes do not apply; take the option out or decode with {other}"
            )
    return found


class _OfLogits:
    """A processor that looks at no text."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, scores: Tensor, places: Places) -> Tensor:
        rows: Tensor = self.processor(None, scores.flatten(0, 1))
        return rows.view_as(scores)


class _RepetitionPenalty:
    """Tokens that stand in the text are less likely."""

    def __init__(self, processor: Any) -> None:
        self.penalty = processor.penalty

    def __call__(self, scores: Tensor, places: Places) -> Tensor:
        every = _positions(places)
        seen = [_marked(scores, places, every < end) for end in places.ends(scores.shape[1])]
        less = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(torch.stack(seen, 1), less, scores)


class _NoRepeatNGram:
    """No sequence of so many tokens stands in a text twice."""

    def __init__(self, processor: Any) -> None:
        self.size = processor.ngram_size

    def __call__(self, scores: Tensor, places: Places) -> Tensor:
        every, tokens = _positions(places), places.tokens
        banned = []
        for end in places.ends(scores.shape[1]):
            alike = (every >= self.size - 1) & (every < end)  # each as the last of a sequence
            for back in range(1, self.size):
                last = tokens.gather(1, (end - back).clamp_min(0))
                alike = alike & (tokens.roll(back, 1) == last)
            banned.append(_marked(scores, places, alike))
        return scores.masked_fill(torch.stack(banned, 1), -torch.inf)


class _MinLength:
    """No text ends before it is so long, its prompt included or not."""

    def __init__(self, processor: Any) -> None:
        self.of_new = isinstance(processor, logits_process.MinNewTokensLengthLogitsProcessor)
        self.least = processor.min_new_tokens if self.of_new else processor.min_length
        self.ends = processor.eos_token_id

    def __call__(self, scores: Tensor, places: Places) -> Tensor:
        written = torch.cat(places.ends(scores.shape[1]), 1)
        short = written - (places.prompt if self.of_new else 0) < self.least
        vocabulary = torch.arange(scores.shape[2], device=scores.device)
        ends = (vocabulary[:, None] == self.ends.to(scores.device)).any(-1)
        return scores.masked_fill(short[..., None] & ends, -torch.inf)


_OF_THE_TEXT: dict[type, Callable[[Any], StaticProcessor]] = {
    logits_process.MinLengthLogitsProcessor: _MinLength,
    logits_process.MinNewTokensLengthLogitsProcessor: _MinLength,
    logits_process.NoRepeatNGramLogitsProcessor: _NoRepeatNGram,
    logits_process.RepetitionPenaltyLogitsProcessor: _RepetitionPenalty,
}


def _positions(places: Places) -> Tensor:
    return torch.arange(places.tokens.shape[1], device=places.tokens.device)[None]


def _marked(scores: Tensor, places: Places, chosen: Tensor) -> Tensor:
    """Tokens of the vocabulary that stand at chosen positions ``[B, C]``; ``[B, V]`` bool."""
    counts = torch.zeros(len(scores), scores.shape[2], dtype=torch.long, device=scores.device)
    return counts.scatter_add(1, places.tokens, chosen.long()) > 0
