"""What was tried for the masked runs of this project's own term, as methods like the peers'.

``peers.py --search`` runs these and those of ``exit_variants.py``; ``LOG.md`` says what was
expected of each and what was found.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import softtrace
import softtrace.loss.density_loss
from recipes.benchmarks.comparison.peer_losses import Method, SoftTrace, smoothed
from softtrace.density.distortion import divergence, total_variation
from softtrace.graph.batch import Batch
from softtrace.graph.masks import hard_masks
from softtrace.loss.draws import hashed_seed
from softtrace.tracing.instrument import Instrument


def some_windows(ids: Tensor, window: int, share: float, draws: torch.Generator) -> Tensor:
    """``[n, window]``: so many of a batch's windows, at least one."""
    windows = ids.unfold(1, window, window).reshape(-1, window)
    count = max(1, round(share * len(windows)))
    return windows[torch.randperm(len(windows), generator=draws)[:count].to(ids.device)]


#: defaults of the time of the search, where later ones differ
THEN: dict[str, Any] = {
    "every": 1,
    "share": 0.15,
    "exits": 0.0,
    "exit_depths": (0.0, 1.0),
    "exit_tokens": 0.125,
    "exit_quantile": 1.0,
    "exit_map": False,
}


class Searched(SoftTrace):
    """The term as it shipped at the time of the search."""

    options: ClassVar[dict[str, Any]] = THEN
    strengths = (0.5,)


def shaped(*strengths: float, **options: Any) -> type[Method]:
    """The term as it is now, with other options."""
    own = {"options": options, "strengths": strengths or (0.35,)}
    return type("WithOptions", (SoftTrace,), own)


def with_options(*strengths: float, **options: Any) -> type[Method]:
    """The term of the time of the search, with other options."""
    return shaped(*(strengths or (0.5,)), **{**THEN, **options})


def reverse_divergence(full: Tensor, masked: Tensor) -> Tensor:
    """KL(q ‖ p): what the masked run says and the full one does not."""
    return divergence(masked, full)


def jensen_shannon(full: Tensor, masked: Tensor) -> Tensor:
    """Jensen-Shannon divergence over log 2: bounded as TV is, smooth where the two meet."""
    p, q = full.float().softmax(-1), masked.float().softmax(-1)
    middle = ((p + q) / 2).clamp_min(1e-12).log()
    sides = F.kl_div(middle, p, reduction="none") + F.kl_div(middle, q, reduction="none")
    return sides.sum(-1) / (2 * math.log(2))


def hinged(full: Tensor, masked: Tensor) -> Tensor:
    """TV beyond 0.1: who is within what the size asks for is left alone."""
    return (total_variation(full, masked) - 0.1).relu()


class HeadSpared(Searched):
    """The term's gradient does not reach the embedding, the final norm and the head."""

    strengths = (0.5,)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        parts = (self.model.model.embed_tokens, self.model.model.norm, self.model.lm_head)
        spared = {id(p): p for part in parts for p in part.parameters()}.values()
        for parameter in spared:
            parameter.requires_grad_(False)
        try:
            return super().term(ids, step, task)
        finally:
            for parameter in spared:
                parameter.requires_grad_(True)


class TwoThresholds(Searched):
    """Half of the windows, two thresholds and two sets of depths each."""

    strengths = (0.5,)
    window = 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = self.density.options.share
        self.density.options = replace(self.density.options, share=1.0)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        draws = torch.Generator().manual_seed(hashed_seed(self.seed, step, 1))
        chosen = some_windows(ids, self.window, self.share / 2, draws)
        return self.density(chosen.repeat(2, 1), step=step).loss


class AveragedTeacher(Searched):
    """The full prediction comes from an exponential average of the weights (decay 0.98)."""

    strengths = (0.5,)
    decay = 0.98

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)

    @torch.no_grad()
    def _follow(self) -> None:
        own = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), own, 1 - self.decay)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        self._follow()
        record = Instrument.record

        def taught(instrument: Instrument, batch: Batch, **options: Any) -> Any:
            with torch.no_grad():
                logits = self.teacher(input_ids=batch.input_ids).logits
            return replace(record(instrument, batch, **options), logits=logits)

        with patch.object(Instrument, "record", taught):
            return super().term(ids, step, task)


class Tilted(Searched):
    """Thresholds rise with depth: half of τ in the first layer to twice τ in the last."""

    strengths = (0.5,)
    span = math.log(4)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        def tilted(importance: Any, thresholds: Any) -> Any:
            last = len(importance.layers) - 1
            factors = [math.exp(self.span * (i / last - 0.5)) for i in range(last + 1)]
            return tuple(
                hard_masks(importance, thresholds * factor)[index]
                for index, factor in enumerate(factors)
            )

        with patch("softtrace.loss.masked_term.hard_masks", tilted):
            return super().term(ids, step, task)


class Falling(Searched):
    """Twice the strength at first, falling to nothing over 400 steps."""

    strengths = (0.5,)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        return super().term(ids, step, task) * max(0.0, 2 * (1 - step / 400))


class Rising(Searched):
    """From nothing to twice the strength over 400 steps."""

    strengths = (0.5,)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        return super().term(ids, step, task) * min(2.0, step / 200)


class Controlled(Searched):
    """Strength follows the slack of the task loss under a budget over the plain run's."""

    strengths = (0.003, 0.006)  # the budget on the training loss
    needs_plain = True
    rate = 5.0

    def __init__(
        self, model: Any, strength: float, seed: int, plain: list[float] | None = None
    ) -> None:
        if plain is None:
            raise ValueError("needs the training losses of the paired plain run")
        super().__init__(model, 1.0, seed)
        self.budget, self.curve = strength, plain
        self.log_weight, self.smooth = math.log(0.35), math.nan

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        now = task.item()
        self.smooth = now if math.isnan(self.smooth) else smoothed(self.smooth, now)
        bound = (1 + self.budget) * self.curve[step]
        change = self.rate * (bound - self.smooth) / bound
        self.log_weight += max(-0.1, min(0.1, change))
        self.log_weight = max(math.log(0.01), min(self.log_weight, math.log(5.0)))
        return super().term(ids, step, task) * math.exp(self.log_weight)


class Projected(Searched):
    """Of the term's gradient what points against the task's is taken out, tensor by tensor."""

    strengths = (0.5,)

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        task = self.model(input_ids=ids, labels=ids).loss
        parameters = list(self.model.parameters())
        term = self.term(ids, step, task)
        if not term.requires_grad:
            return task, task
        found = torch.autograd.grad(term, parameters, allow_unused=True)
        own = torch.autograd.grad(task, parameters, retain_graph=True)
        surrogate = task
        for parameter, added, wanted in zip(parameters, found, own, strict=True):
            if added is None:
                continue
            against = (added * wanted).sum().clamp(max=0.0)
            added = added - against / wanted.square().sum().clamp_min(1e-20) * wanted
            surrogate = surrogate + (parameter * added).sum()  # its gradient is ``added``
        return surrogate, task.detach()


class ExitsToo(Searched):
    """Two thirds of the windows as shipped, and half as many without masks.

    The latter are read after a random number of layers at every token, easy or not, and compared
    with the full prediction, which is held constant.
    """

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {**THEN, "share": 0.1}
    window, share, weight, lowest = 64, 0.075, 0.2, 0.25
    distance = staticmethod(divergence)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        draws = torch.Generator().manual_seed(hashed_seed(self.seed, step, 2))
        chosen = some_windows(ids, self.window, self.share, draws)
        layers = len(self.layers)
        lowest = max(1, round(self.lowest * layers))
        depths = torch.randint(lowest, layers, chosen.shape, generator=draws).to(ids.device)
        with self.watching(True, self.layers[1:]) as seen:
            full = self.model(input_ids=chosen).logits.detach()
        read = torch.stack(seen).gather(
            0, (depths - 1)[None, ..., None].expand(1, *depths.shape, seen[0].shape[-1])
        )[0]
        distance = self.distance(full, self.exit_logits(read)).mean()
        return super().term(ids, step, task) + self.weight * distance


def exits_too(distance: Any, weight: float, lowest: float, **options: Any) -> type[Method]:
    """That with other numbers."""
    own = {
        "distance": staticmethod(distance),
        "weight": weight,
        "lowest": lowest,
        "options": {**THEN, "share": 0.1, **options},
    }
    return type("Exits", (ExitsToo,), own)


class Independent(SoftTrace):
    """Thresholds and depths drawn independently, not one from each of as many equal strata."""

    strengths = (0.35,)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        def independent(count: int, generator: torch.Generator) -> Tensor:
            return torch.rand(count, generator=generator)

        with patch("softtrace.loss.draws._stratified", independent):
            return super().term(ids, step, task)


class Even(SoftTrace):
    """Thresholds uniform between their bounds, instead of their logarithms."""

    strengths = (0.35,)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        low, high = self.density.options.thresholds

        def evenly(**words: Any) -> Any:
            drawn = softtrace.loss.draws.draw(**words)
            share = (drawn.thresholds / low).log() / math.log(high / low)
            return replace(drawn, thresholds=low + (high - low) * share)

        with patch("softtrace.loss.windows.draw", evenly):
            return super().term(ids, step, task)


class SizeInBudget(Controlled):
    """The term as it is now, a size term, and a strength that holds the task loss in a budget."""

    strengths = (0.005,)
    options: ClassVar[dict[str, Any]] = {"size_weight": 2.0}


class MixedWindows(SoftTrace):
    """Windows from 64 tokens to a row of 512: another length at every step with masked runs."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}
    lengths = (64, 128, 256, 512)

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        length = self.lengths[step // self.every % len(self.lengths)]
        self.density.options = replace(self.density.options, crop=length)
        return super().term(ids, step, task)


#: lengths of windows, to compare on rows of 512 tokens
WINDOWS: dict[str, type[Method]] = {
    "windows of 64": shaped(),
    "windows of 256": shaped(crop=256),
    "windows of 64 to 512": MixedWindows,
}
#: how thresholds are drawn, the edge of masks and of easiness, and a size term within a budget
SHAPES: dict[str, type[Method]] = {
    "draws not stratified": Independent,
    "thresholds even": Even,
    "soft masks, temperature 0.1": shaped(masks="soft", temperature=0.1),
    "soft masks, temperature 2": shaped(masks="soft", temperature=2.0),
    "easiness a hard step": shaped(easy_width=0.0),
    "easiness a wide step": shaped(easy_width=1.0),
    "size term by a loss budget": SizeInBudget,
}

MASKED: dict[str, type[Method]] = {
    "as shipped": with_options(),
    "every 4th step, share 0.3": with_options(every=4, share=0.3),
    "every 4th step, share 0.6": with_options(every=4, share=0.6),
    "every 4th step": with_options(every=4),
    "share 1": with_options(share=1.0),
    "soft masks": with_options(masks="soft"),
    "attention recomputed": with_options(attention="recomputed"),
    "size term": with_options(size_weight=2.0),
    "easy by loss": with_options(easiness="loss"),
    "easy by margin": with_options(easiness="margin"),
    "depths .25..1": with_options(depths=(0.25, 1.0)),
    "depths .25..1, most tokens": with_options(depths=(0.25, 1.0), easy_quantile=0.7),
    "thresholds .05..0.7": with_options(thresholds=(0.05, 0.7)),
    "windows of 32": with_options(crop=32),
    "reverse KL": with_options(distance=reverse_divergence),
    "Jensen-Shannon": with_options(distance=jensen_shannon),
    "TV beyond 0.1": with_options(distance=hinged),
    "two thresholds a window": TwoThresholds,
    "thresholds rise with depth": Tilted,
    "averaged teacher": AveragedTeacher,
    "head spared": HeadSpared,
    "strength falls": Falling,
    "strength rises": Rising,
    "strength by a loss budget": Controlled,
    "gradient projected": Projected,
    "exits of all tokens, 0.2": ExitsToo,
    "exits of all tokens, 0.5": exits_too(divergence, 0.5, 0.25),
    "exits by TV, 0.35": exits_too(total_variation, 0.35, 0.5),
    "exits by TV from a quarter, 0.35": exits_too(total_variation, 0.35, 0.25),
    "exits by TV, 0.35, else sparse": exits_too(total_variation, 0.35, 0.5, family="sparse"),
    "exits by TV, 0.7, else sparse": exits_too(total_variation, 0.7, 0.5, family="sparse"),
    "exits by TV, 0.7": exits_too(total_variation, 0.7, 0.5),
    "own exits, 1/8 of tokens, 0.4": with_options(exits=0.4),
    "own exits, 1/8 of tokens, 1.2": with_options(exits=1.2),
    "own exits, 1/4 of tokens, 0.8": with_options(exits=0.8, exit_tokens=0.25),
    "own exits, 1/4, 0.5, share 0.1": with_options(exits=0.5, exit_tokens=0.25, share=0.1),
    "own exits, 1/2, 0.8, share 0.1": with_options(exits=0.8, exit_tokens=0.5, share=0.1),
    "exits by KL from half, 0.05": exits_too(divergence, 0.05, 0.5),
}
