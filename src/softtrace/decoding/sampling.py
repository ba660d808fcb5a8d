"""Drafted texts that are drawn, not chosen, with the distribution of plain sampling.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a guess x
drawn with probability q(x) is taken with probability min(1, p(x)/q(x)), where p is what the whole
model draws with; in place of the first that is not, a token is drawn from max(0, p - q).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softtrace.decoding.static_model import StaticModel
from softtrace.decoding.static_steps import Steps, Texts


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, as ``model.generate(do_sample=True)`` draws them.

    Attributes:
        temperature, top_k, top_p, min_p: What generate calls so; None takes the generation
            config's.
        seed: Of a decoder's draws, which continue from one call to the next. A new decoder writes
            the same texts again where prompts, their order, model and machine are the same.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Options of ``model.generate`` that are said here."""
        names = ("temperature", "top_k", "top_p", "min_p")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


class SampledSteps(Steps):
    """Steps that draw tokens, by noise that is made between them.

    Attributes:
        drawn_with: ``[B, K, V]`` float32, q of each guess; there are K - 1 at most.
        noise: ``[B, K + 1, V]`` float32: the largest of p / exponential noise is drawn with
            probability p. The last is for the token in place of a guess.
        coins: ``[B, K]`` float32 in [0, 1), for whether a guess is taken.
    """

    def __init__(
        self,
        model: StaticModel,
        texts: Texts,
        draft_tokens: int,
        processors: Any,
        doubting: bool,
        sampling: Sampling,
    ) -> None:
        super().__init__(model, texts, draft_tokens, processors, doubting)
        rows, device = len(texts.tokens), model.device
        self.drawn_with = torch.zeros(rows, draft_tokens, self.vocabulary, device=device)
        self.noise = torch.ones(rows, draft_tokens + 1, self.vocabulary, device=device)
        self.coins = torch.zeros(rows, draft_tokens, device=device)
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def refresh(self, count: int) -> None:
        """Make noise for so many tokens, and for one in place of a guess."""
        for part in (self.noise[:, :count], self.noise[:, -1]):
            part.exponential_(generator=self.generator).clamp_min_(torch.finfo(part.dtype).tiny)
        self.coins.uniform_(generator=self.generator)

    def scores(self, logits: Tensor, start: Tensor) -> Tensor:
        """Probabilities ``[B, N, V]`` float32."""
        return super().scores(logits, start).float().softmax(-1)

    def choose(self, scores: Tensor) -> Tensor:
        """Draw ``[B, 1]``, and remember with what."""
        self.drawn_with.index_copy_(1, self.place, scores)
        return _largest(scores, self.noise.index_select(1, self.place))

    def _surely_guessed(self, guesses: Tensor) -> None:
        certain = torch.zeros_like(self.drawn_with[:, : guesses.shape[1]])
        self.drawn_with[:, : guesses.shape[1]] = certain.scatter(2, guesses[..., None], 1.0)

    def judge(self, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which guesses are taken, and what is written in their places; see the module."""
        count, places = guesses.shape[1], guesses[..., None]
        # Behind the guesses nothing was drawn, so that the token there is drawn from p as it is.
        guessed = torch.arange(count, device=guesses.device) < self.drafted - 1
        drawn_with = torch.where(guessed[:, None], self.drawn_with[:, :count], 0)
        wanted, given = scores.gather(2, places)[..., 0], drawn_with.gather(2, places)[..., 0]
        right = guessed & (self.coins[:, :count] * given < wanted)
        instead = _largest((scores - drawn_with).clamp_min(0), self.noise[:, -1:])
        return right, torch.where(right, guesses, instead)


def _largest(weights: Tensor, noise: Tensor) -> Tensor:
    """Tokens ``[B, N]`` drawn in proportion to weights ``[B, N, V]``."""
    return (weights / noise).argmax(-1)
