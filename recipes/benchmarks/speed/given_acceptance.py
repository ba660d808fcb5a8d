"""Decoding whose guesses are right as often as was given, whatever the model says.

What drafting costs at an acceptance that no model has yet: all runs of the model are those of
drafting in earnest, and only which guesses are right is decided by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softtrace.decoding import StaticDecoder
from softtrace.decoding.static_steps import Steps


class GivenSteps(Steps):
    """Steps whose guesses are right by chance.

    Attributes:
        chance: ``[1]``, the probability, which a captured step reads anew.
        coins: ``[B, C]`` in [0, 1): the guess at a position is right where its coin is less than
            the probability. They lie in a tensor, so that no step draws anything.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chance = torch.ones(1, device=self.place.device)
        self.coins = torch.zeros(self.texts.tokens.shape, device=self.place.device)

    def judge(self, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's agreement would be used."""
        best = scores.argmax(-1)
        places = self.texts.length + torch.arange(best.shape[1], device=best.device)
        return self.coins.gather(1, places) < self.chance, best


class GivenDecoder(StaticDecoder):
    """A decoder whose acceptance is given; what it writes means nothing."""

    def _make_steps(self) -> Steps:
        return GivenSteps(self._parts, self._texts, self.draft_tokens, self._processors)

    def accept(self, share: float, seed: int) -> None:
        """Let each guess be right with this probability from now on.

        The same seed makes the same positions right, whatever drafts.
        """
        steps: Any = self._steps
        steps.chance.fill_(share)
        draw = torch.Generator().manual_seed(seed)
        steps.coins.copy_(torch.rand(steps.coins.shape, generator=draw))
