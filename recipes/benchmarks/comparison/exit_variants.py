"""What was tried for early exits, and for how seldom masked runs come: see ``variants.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.benchmarks.comparison.peer_losses import METHODS, Method, MoreExits, Seldom
from recipes.benchmarks.comparison.variants import MASKED, SHAPES, WINDOWS, with_options
from softtrace import DensityLoss
from softtrace.density.distortion import divergence, total_variation
from softtrace.loss.early_exits import exit_distance

Distance = Callable[[Tensor, Tensor], Tensor]


def with_exits(*strengths: float, **options: Any) -> type[Method]:
    """The term on two thirds of the windows, and exits in the training forward."""
    return with_options(*strengths, **{"share": 0.1, "exits": 0.5, "exit_tokens": 0.25, **options})


FROM = {"exit_depths": (0.25, 1.0)}

#: how often the term comes, and which exits: equal time on a CPU but for the first and the last
EXITS: dict[str, type[Method]] = {
    "no exits, share 0.15": with_options(0.35, share=0.15, exits=0.0),
    "no exits, every 4th, share 0.4": with_options(0.35, every=4, share=0.4, exits=0.0),
    "exits 0.5": with_exits(0.25, 0.35),
    "exits 1": with_exits(0.25, 0.35, exits=1.0),
    "exits 0.5, share 0.15": with_exits(0.3, share=0.15),
    "exits 0.5, half the tokens": with_exits(0.3, exit_tokens=0.5),
    "exits 0.5 from a quarter": with_exits(0.3, **FROM),
    "exits 1 from a quarter": with_exits(0.3, exits=1.0, **FROM),
    "exits 0.5, a quarter to half": with_exits(0.3, exit_depths=(0.25, 0.5)),
    "exits 0.5, every 4th": with_exits(0.3, every=4, share=0.4),
    "exits 0.5, every 8th": with_exits(0.3, every=8, share=0.8),
    "exits 0.5 from a quarter, every 4th": with_exits(0.35, every=4, share=0.3, **FROM),
    "exits 0.5 from a quarter, every 8th": with_exits(0.35, every=8, share=0.6, **FROM),
    "exits 0.5 from a quarter, every 8th, fewer": with_exits(0.35, every=8, share=0.4, **FROM),
    "exits 0.7 from a quarter, every 8th": with_exits(0.35, exits=0.7, every=8, share=0.6, **FROM),
    "exits 0.2 from a quarter, every 8th": with_exits(
        0.35, 0.5, exits=0.2, every=8, share=0.6, **FROM
    ),
    "exits 0.2 from a quarter, every 4th": with_exits(0.35, exits=0.2, every=4, share=0.3, **FROM),
    "exits 0.2 from a quarter, share 0.15": with_exits(0.35, exits=0.2, share=0.15, **FROM),
    "exits 0.3 from a quarter, every 8th, more": with_exits(
        0.35, exits=0.3, every=8, share=0.8, **FROM
    ),
    "exits 0.3 from a quarter, every 2nd": with_exits(0.35, exits=0.3, every=2, share=0.25, **FROM),
    "exits 0.5, whole batch": with_exits(0.3, share=1.0, exit_tokens=1.0),
}


class Spread(Seldom):
    """The gradient of a masked run is spread over the steps to the next, instead of one pulse.

    A pulse is k times as strong: clipping by norm shortens it, and the task's gradient with it.
    """

    strengths = (0.35,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked = DensityLoss(self.model, self.density.options, exits=0.0)
        self.held: tuple[Any, Tensor] = ([], torch.zeros(()))
        self.density.options = replace(self.density.options, every=10**9)  # exits alone

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        parameters = list(self.model.parameters())
        if step % self.every == 0:
            masked = self.masked(ids, step=step).loss / self.every
            found = torch.autograd.grad(masked, parameters, allow_unused=True)
            self.held = found, masked.detach()
        pairs = zip(parameters, self.held[0], strict=True)
        slope = sum((each * held).sum() for each, held in pairs if held is not None)
        exits = super().term(ids, step + 1, task)
        return exits + self.held[1] + slope - slope.detach()  # its gradient is what is held


def for_drafting(
    exits: float, low: float, high: float, share: float = 0.3, tokens: float = 0.5
) -> type[Method]:
    """More weight on exits, and only on such as can draft."""
    return with_exits(
        0.35, exits=exits, exit_tokens=tokens, exit_depths=(low, high), every=8, share=share
    )


def seldom(*strengths: float, **options: Any) -> type[Method]:
    """Masked runs at every 8th step on so much of the batch as a GPU has memory for."""
    usual = {"every": 8, "share": 0.3, "exits": 0.2, "exit_depths": (0.25, 1.0), **options}
    return with_options(*(strengths or (0.35,)), **usual)


#: within the budget of a GPU, and a weight of exits that does not rise with the strength
SELDOM: dict[str, type[Method]] = {
    "every step": seldom(0.35, every=1, share=0.125),
    "every step, same exits at 0.8": seldom(0.8, every=1, share=0.125, exits=0.0875),
    "every step, same exits at 1.6": seldom(1.6, every=1, share=0.125, exits=0.04375),
    "every step, exits 0.5 of 1/4": seldom(0.35, every=1, share=0.125, exits=0.5, exit_tokens=0.25),
    "whole batch": seldom(0.35, every=1, share=1.0),
    "8th": seldom(0.35, 0.5),
    "10th": seldom(every=10),
    "10th, share 0.375": seldom(every=10, share=0.375),
    "8th, exits of 1/4": seldom(exit_tokens=0.25),
    "8th, share 0.4": seldom(share=0.4),
    "8th, same exits at 0.8": seldom(0.8, exits=0.0875),
    "8th, exits 0.5 of 1/4": seldom(exits=0.5, exit_tokens=0.25),
    "8th, exits 0.5 of 1/4, to half": seldom(exits=0.5, exit_tokens=0.25, exit_depths=(0.25, 0.5)),
    "8th, exits 1 of 1/4": seldom(0.25, 0.35, exits=1.0, exit_tokens=0.25),
    "8th, exits 1 of 1/2, to half": seldom(exits=1.0, exit_tokens=0.5, exit_depths=(0.25, 0.5)),
    "8th, exits 0.44 of 1/4 at 0.8": seldom(0.8, exits=0.22, exit_tokens=0.25),
}

DRAFTING: dict[str, type[Method]] = {
    "drafting exits 1": for_drafting(1.0, 0.1, 0.5, 0.6),
    "drafting exits 3": for_drafting(3.0, 0.1, 0.5, 0.6),
    "drafting after 0.19, exits 1": for_drafting(1.0, 0.19, 0.19),
    "drafting after 0.21, exits 1": for_drafting(1.0, 0.21, 0.21),
    "drafting after 0.21, exits 1.5": for_drafting(1.5, 0.21, 0.21),
    "drafting after 0.21, exits 2": for_drafting(2.0, 0.21, 0.21),
    "drafting after 0.21 to 0.5, exits 1": for_drafting(1.0, 0.21, 0.5),
    "drafting after 0.21 to 0.5, exits 2": for_drafting(2.0, 0.21, 0.5),
    "drafting after 0.25, exits 0.5": for_drafting(0.5, 0.25, 0.25),
    "drafting after 0.25, exits 1": for_drafting(1.0, 0.25, 0.25),
    "drafting after 0.25, exits 1 of all": for_drafting(1.0, 0.25, 0.25, tokens=1.0),
    "drafting after 0.25, exits 2": for_drafting(2.0, 0.25, 0.25),
    "drafting after 0.25 to 0.31, exits 1": for_drafting(1.0, 0.25, 0.31),
    "drafting after 0.31, exits 1": for_drafting(1.0, 0.31, 0.31),
}


class OtherExits(MoreExits):
    """``softtrace, more exits`` with exits of another kind."""

    strengths = (0.25,)

    def distances(self, *args: Any) -> Tensor:
        return exit_distance(*args)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        with patch("softtrace.loss.exit_term.exit_distance", self.distances):
            return super().term(ids, step, task)


def judged_by(distance: Distance, weight: float) -> type[Method]:
    """Exits judged by another distance than KL."""

    class Judged(OtherExits):
        options: ClassVar[dict[str, Any]] = {**MoreExits.options, "exits": weight}

        def distances(self, *args: Any) -> Tensor:
            with patch("softtrace.loss.early_exits.divergence", distance):
                return exit_distance(*args)

    return Judged


class ExitsSpareHead(OtherExits):
    """The gradient of exits does not reach the final norm and the head, nor what is tied to it."""

    def distances(self, *args: Any) -> Tensor:
        parts = (self.model.model.norm, self.model.lm_head)
        spared = [parameter for part in parts for parameter in part.parameters()]
        for parameter in spared:
            parameter.requires_grad_(False)
        try:
            return exit_distance(*args)
        finally:
            for parameter in spared:
                parameter.requires_grad_(True)


def surely(full: Tensor, exit_logits: Tensor) -> Tensor:
    """KL weighted by the full prediction's largest probability, the weights 1 on average."""
    sure = full.float().softmax(-1).amax(-1)
    return divergence(full, exit_logits) * sure / sure.mean()


def likeliest(full: Tensor, exit_logits: Tensor) -> Tensor:
    """Cross-entropy of the exit from the full prediction's most likely token alone, nats."""
    return F.cross_entropy(exit_logits.float(), full.argmax(-1), reduction="none")


class FromHalf(MoreExits):
    """``softtrace, more exits``, all of them in the third quarter of the layers."""

    strengths = (0.15, 0.25)
    options: ClassVar[dict[str, Any]] = {**MoreExits.options, "exit_depths": (0.5, 0.75)}


#: what exits are judged by, what learns from it, and when
JUDGED: dict[str, type[Method]] = {
    "exits by TV 2": judged_by(total_variation, 2.0),
    "exits by likeliest 1": judged_by(likeliest, 1.0),
    "exits by sure KL 1": judged_by(surely, 1.0),
    "exits spare the head": ExitsSpareHead,
    "every 8th, spread": Spread,
    "more exits, half to 3/4": FromHalf,
}
VARIANTS = MASKED | EXITS | SELDOM | DRAFTING | JUDGED | SHAPES | WINDOWS

EVERY = METHODS | VARIANTS
