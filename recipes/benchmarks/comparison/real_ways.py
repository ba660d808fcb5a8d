"""Ways to train a real model that ``on_real_models.py`` compares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recipes.benchmarks.comparison.exit_variants import OtherExits
from recipes.benchmarks.comparison.peer_losses import (
    DIRECT,
    METHODS,
    ActivationL1,
    AttentionConnectivity,
    AttentionEntropy,
    ExitDistillation,
    LayerSkip,
    Method,
    SoftTrace,
)
from recipes.benchmarks.comparison.variants import MixedWindows
from softtrace.loss import learned_maps
from softtrace.loss.masked_term import MaskedTerm
from softtrace.loss.schedule import StrengthSchedule
from softtrace.loss.term import DensityTerm
from softtrace.model.exit_maps import exit_maps_of


def term(strength: float, **options: Any) -> type[SoftTrace]:
    """The term at one strength, with other options than the defaults."""
    return type("Term", (SoftTrace,), {"strengths": (strength,), "options": options})


class TamedExits(OtherExits):
    """The logarithm of one and the distance: exits that are far off do not take over."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}

    def distances(self, *args: Any) -> Tensor:
        return super().distances(*args).log1p()


class MapFirst(SoftTrace):
    """The maps of exits learn alone for the first fifth of 1,000 steps."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        waiting = StrengthSchedule(0.07, 200)
        with patch.object(type(self.density.options), "exit_schedule", waiting):
            return super().term(ids, step, task)


class MapsAtRate(SoftTrace):
    """The maps of exits learn at another rate."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}
    rate = 3e-4

    def __init__(self, *args: Any) -> None:
        with patch.object(learned_maps, "_RATE", self.rate):
            super().__init__(*args)


class MapsAveraged(SoftTrace):
    """The maps of exits become their moving average at every measurement, so also at the end."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}
    decay = 0.98  # of 1,000 steps there are 25 measurements, forty steps apart

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.averages: dict[str, Tensor] = {}

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        found = super().term(ids, step, task)
        with torch.no_grad():
            for name, weight in self.maps().items():
                average = self.averages.setdefault(name, weight.detach().clone())
                average.lerp_(weight, 1 - self.decay)
        return found

    def maps(self) -> Any:
        maps = exit_maps_of(self.model)
        assert maps is not None
        return maps.weights

    def measured(self, step: int, loss: float) -> None:
        with torch.no_grad():
            for name, weight in self.maps().items():
                change = (weight - self.averages[name]).norm() / weight.norm().clamp(min=1e-9)
                print(f"  {name}: {float(change):.3f} of it is not in its average", flush=True)
                weight.copy_(self.averages[name])


class ByDistortion(SoftTrace):
    """The strength falls with the distortion: a model that is sparse already pays less for it."""

    strengths = (0.35,)
    options: ClassVar[dict[str, Any]] = {"preset": "balanced"}
    distortion: Tensor
    whole = 0.9  # distortion at which the strength is whole, about that of a model before

    def term(self, ids: Tensor, step: int, task: Tensor) -> Tensor:
        usual = MaskedTerm.at

        def at(found: MaskedTerm, strength: float) -> DensityTerm:
            self.distortion = found.distortion
            scaled = found.term * (found.distortion / self.whole)
            return usual(found._replace(term=scaled), strength)

        with patch.object(MaskedTerm, "at", at):
            return super().term(ids, step, task)

    def measured(self, step: int, loss: float) -> None:
        print(f"  distortion: {float(self.distortion):.3f}", flush=True)


class Budgeted(SoftTrace):
    """One per cent of held-out loss is what it may cost; the strength follows."""

    strengths = (0.35,)

    def __init__(self, model: Any, strength: float, seed: int, plain: dict[int, float]) -> None:
        self.options = {"budget": 0.01, "reference": plain}  # type: ignore[misc]
        super().__init__(model, strength, seed, plain)

    def measured(self, step: int, loss: float) -> None:
        assert self.density.budget is not None
        self.density.budget.update(step, loss)
        print(f"  factor of the strength: {self.density.budget.factor:.3f}", flush=True)


def mean_of_rows(loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The mean of a loss ``[B, ...]`` made row by row, and made again in the backward pass.

    Logits of a whole batch over 262,144 tokens of a vocabulary, as Gemma has them, take 9 GB for
    every copy; a row's take half a gigabyte.
    """
    rows = zip(*(each.split(1) for each in tensors), strict=True)
    return torch.stack([checkpoint(loss, *row, use_reentrant=False) for row in rows]).mean()


class RealLayerSkip(LayerSkip):
    """The same loss in less memory."""

    def early_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return mean_of_rows(super().early_loss, hidden, ids)


class RealExitDistillation(ExitDistillation):
    """The same loss in less memory."""

    def distance(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return mean_of_rows(super().distance, logits, hidden)


class RealConnectivity(AttentionConnectivity):
    """Connectivity under a bound on the held-out loss, which is what all ways are read at.

    The multiplier's logarithm follows the relative slack of the held-out loss at every measurement
    instead of the training loss at every step. Of 1,000 steps there are 25 measurements, so the
    gain of one is larger: half an e-fold where nothing of 1 % is spent, and at most one either way.
    The slack is the one expected at the next measurement if the excess continues as it went since
    the last, because a loss answers to a weight late (as in ``softtrace.loss.budget``). The bound
    is (1 + dial) times the paired plain run's held-out loss at the same step.
    """

    rate = 50.0
    before = 0.0  # excess of the loss at the last measurement; both runs begin with one model

    def weight(self, task: Tensor, step: int) -> float:
        return math.exp(self.log_weight)

    def measured(self, step: int, loss: float) -> None:
        assert isinstance(self.plain, dict)
        excess = loss / self.plain[step] - 1
        slack = self.strength - (excess + (excess - self.before))
        self.before = excess
        self.log_weight += max(-1.0, min(1.0, self.rate * slack))
        self.log_weight = max(math.log(1e-4), min(self.log_weight, math.log(1e4)))
        print(f"  weight of the connectivity: {math.exp(self.log_weight):.3g}", flush=True)


def peer(method: type[Method], strength: float, **changes: Any) -> type[Method]:
    """Another project's loss at one strength."""
    return type(method.__name__, (method,), {"strengths": (strength,), **changes})


#: other projects' losses at strengths that cost about 1 % of a real model's held-out loss. What
#: LayerSkip costs at its smallest weights is its layer dropout, so it is there without as well.
PEERS: dict[str, type[Method]] = {
    **{f"layerskip, {s:g}": peer(RealLayerSkip, s) for s in (0.002, 0.01, 0.05)},
    **{f"layerskip, {s:g}, no dropout": peer(RealLayerSkip, s, p_max=0.0) for s in (0.01, 0.05)},
    **{f"exit distillation, {s:g}": peer(RealExitDistillation, s) for s in (0.03, 0.1)},
    **{f"activation L1, {s:g}": peer(ActivationL1, s) for s in (2.0, 20.0)},
    **{f"attention entropy, {s:g}": peer(AttentionEntropy, s) for s in (0.03, 0.1)},
    "attention connectivity, 0.01": peer(RealConnectivity, 0.01),
}
_OFTEN = {**DIRECT, "every": 2, "share": 0.15}
#: ways to train beside those of ``peers.py``
WAYS: dict[str, Any] = {
    **METHODS,
    "balanced": term(0.35, preset="balanced"),
    "balanced, budget 0.01": Budgeted,
    "balanced, exit tokens 0.125": term(0.35, preset="balanced", exit_tokens=0.125),
    "balanced, windows of 256": term(0.35, preset="balanced", crop=256),
    "balanced, windows of 64 to 512": MixedWindows,
    "balanced, 1": term(1.0, preset="balanced", exits=0.07),
    "balanced, 0.15": term(0.15, preset="balanced"),
    "balanced, 0.2": term(0.2, preset="balanced"),
    "balanced, exits 0.4": term(0.35, preset="balanced", exits=0.4),
    "balanced, maps at 3e-4": MapsAtRate,
    "balanced, maps averaged": MapsAveraged,
    "balanced, exits 0.1": term(0.35, preset="balanced", exits=0.1),
    "balanced, exits 0.05": term(0.35, preset="balanced", exits=0.05),
    "balanced, exits tamed": TamedExits,
    "balanced, by distortion": ByDistortion,
    "balanced, by distortion, 0.6": type("Term", (ByDistortion,), {"strengths": (0.6,)}),
    "balanced, maps first": MapFirst,
    "sparse": term(0.35, preset="sparse"),
    "sparse, 1": term(1.0, preset="sparse"),
    "sparse, thresholds from 0.08": term(0.35, preset="sparse", thresholds=(0.08, 0.6)),
    "sparse, windows of 256": term(0.35, preset="sparse", crop=256),
    "decode": term(0.1, preset="decode"),
    "soft": term(0.35, preset="soft"),
    "map alone": term(0.35, preset="sparse", exit_map=True),
    **PEERS,
    **{f"every 2nd, {s:g}": term(s, **_OFTEN) for s in (0.05, 0.1, 0.2, 0.35)},
    **{f"every 2nd, {s:g}, no exits": term(s, **_OFTEN, exits=0.0) for s in (0.35, 1.0, 3.0)},
    "every 2nd, 1, few exits": term(1.0, **_OFTEN, exits=0.02),
    "every 2nd, 1, no exits, windows of 128": term(1.0, **_OFTEN, exits=0.0, crop=128),
    "every 2nd, 1, no exits, soft": term(1.0, **_OFTEN, exits=0.0, masks="soft", temperature=0.1),
    "every 8th, 0.35": term(0.35, **{**DIRECT, "every": 8, "share": 0.3}),
    "every 2nd, 0.2, recomputed": term(0.2, **_OFTEN, attention="recomputed"),
    "every 2nd, 0.2, soft": term(0.2, **_OFTEN, masks="soft", temperature=0.1),
    "every 2nd, 0.2, windows of 128": term(0.2, **_OFTEN, crop=128),
    "every step, 0.2": term(0.2, **{**DIRECT, "every": 1, "share": 0.075}),
    "every 2nd, 0.1, more exits": term(0.1, **{**_OFTEN, "exits": 2.0, "exit_tokens": 0.25}),
    "decode, a fifth": term(0.1, preset="decode", exit_depths=(0.2, 0.2)),
}
