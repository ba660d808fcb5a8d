"""Which conclusions survive a change of the definition, where papers differ in it.

A masked run has choices that are seldom named: where attention probabilities come from, how large
an edge is, what stands in for an absent one, and at how many thresholds a curve is read. Every
combination is measured here on the same tokens, and three conclusions are asked of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from softtrace.density.curve import DensityCurve, default_thresholds, fine_thresholds
from softtrace.density.sweep import curve_of
from softtrace.evaluation.bootstrap import (
    Difference,
    Interval,
    Median,
    RankCorrelation,
    Ratio,
    Statistic,
    intervals,
    mean,
)
from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.answers import CONSTRUCTION_ENDS
from softtrace.evaluation.study.readings import STUDY_SIZES, joined
from softtrace.graph.importance import Norm
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.masking import AttentionKind

StandIn = Literal["nothing", "mean"]
"""What an absent edge carries: nothing, or its mean (:mod:`softtrace.tracing.means`)."""

Grid = Literal["11", "26", "90"]
"""How many thresholds a curve is read from: the default ones, 26, or the fine ones."""


@dataclass(frozen=True, order=True)
class Definition:
    """One way to measure.

    Attributes:
        attention: of masked runs.
        norm: how large an edge is.
        stand_in: what an absent edge carries.
        thresholds: which grid.
    """

    attention: AttentionKind = "recomputed"
    norm: Norm = "l1"
    stand_in: StandIn = "nothing"
    thresholds: Grid = "11"

    def __str__(self) -> str:
        return f"{self.attention}, {self.norm}, {self.stand_in}, {self.thresholds}"


DEFINITIONS = tuple(
    itertools.starmap(
        Definition,
        itertools.product(
            get_args(AttentionKind), get_args(Norm), get_args(StandIn), get_args(Grid)
        ),
    )
)
"""All 54 of them."""


@dataclass(frozen=True)
class Reading:
    """One model measured by one definition; ``N`` sequences, ``M`` explained tokens of each.

    Attributes:
        variation: ``[N, 25]`` TV at :data:`~softtrace.evaluation.study.readings.STUDY_SIZES`,
            summed over a sequence's tokens.
        area, size, entropy: ``[N, M]``; size is that at TV 0.2, entropy in nats.
    """

    variation: Tensor
    area: Tensor
    size: Tensor
    entropy: Tensor


def grid_of(name: Grid) -> tuple[float, ...]:
    """The thresholds of a grid."""
    fine = fine_thresholds()
    every = len(fine) / 26
    return {
        "11": default_thresholds(),
        "26": tuple(fine[int((number + 0.5) * every)] for number in range(26)),
        "90": fine,
    }[name]


@torch.no_grad()
def read_definitions(
    model: nn.Module,
    blocks: Tensor,
    *,
    first: int,
    batch_size: int,
    progress: Progress,
    definitions: Sequence[Definition] = DEFINITIONS,
) -> dict[Definition, Reading]:
    """Measure one model by many definitions, each masked run once.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids; means that stand in for absent edges are taken over these too.
        first: explained are the tokens from this place to the last but one.
        batch_size: sequences a forward.
        progress: called with the number of sequences times ways that were measured.
        definitions: to measure by.
    """
    instrument = attach(model)
    device = device_of_module(model)
    explained = slice(first, blocks.shape[1] - 1)
    parts = [instrument.batch(part.to(device)) for part in torch.split(blocks, batch_size)]
    wanted_means = any(each.stand_in == "mean" for each in definitions)
    means = instrument.means_of(parts) if wanted_means else None
    found: dict[Definition, list[Reading]] = {each: [] for each in sorted(definitions)}
    for batch in parts:
        positions = torch.zeros_like(batch.valid)
        positions[:, explained] = True
        for norm, of_norm in itertools.groupby(sorted(found, key=_by_norm), key=_by_norm):
            recording = instrument.record(batch, norm=norm)
            for way, of_way in itertools.groupby(of_norm, key=_by_way):
                together = list(of_way)
                taus = sorted({tau for each in together for tau in grid_of(each.thresholds)})
                attention, stand_in = way
                curve = curve_of(
                    instrument, recording, recording.importance, taus, attention=attention,
                    positions=positions, means=means if stand_in == "mean" else None,
                )  # fmt: skip
                for each in together:
                    found[each].append(_reading(_part(curve, grid_of(each.thresholds)), explained))
                progress(len(batch.input_ids))
    return {each: joined(readings) for each, readings in found.items()}


def ways() -> int:
    """How many sweeps each sequence is run through: definitions but for their thresholds."""
    return len({(each.norm, *_by_way(each)) for each in DEFINITIONS})


_by_norm, _by_way = attrgetter("norm"), attrgetter("attention", "stand_in")


def _part(curve: DensityCurve, thresholds: Sequence[float]) -> DensityCurve:
    """The curve as read from some of its thresholds."""
    wanted = torch.tensor(sorted(thresholds, reverse=True), dtype=torch.float64)
    places = (curve.thresholds.cpu()[None] == wanted[:, None]).int().argmax(1)
    places = places.to(curve.size.device)
    return replace(
        curve,
        thresholds=curve.thresholds[places],
        size=curve.size[places],
        total_variation=curve.total_variation[places],
    )


def _reading(curve: DensityCurve, explained: slice) -> Reading:
    values = curve.at_sizes(STUDY_SIZES)[:, :, explained].sum(2).T
    others = (curve.area(), curve.size_at(), curve.entropy)
    return Reading(values.cpu(), *(each[:, explained].cpu() for each in others))


CONCLUSIONS = {
    "two_phases": "most of the fall of TV comes below 1 % of the edges",
    "entropy": "the more uncertain the model, the larger the area",
    "order": "the second model has a smaller area than the first",
}
"""What is asked of every definition; the last one of two models."""


def conclusions(
    readings: Sequence[Mapping[Definition, Reading]], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """What each definition says: numbers with intervals, and whether each conclusion holds.

    Args:
        readings: of one model, or of two on the same tokens.
        resamples, seed: of the bootstrap over sequences.

    Returns:
        A dict a definition: its choices; ``models``, a list with ``size``, ``area``, ``two_phases``
        and ``entropy`` of each model as intervals; with two models ``order``, the difference of
        their areas; and ``holds``, by :data:`CONCLUSIONS`: ``"yes"``, ``"no"``, or ``"open"`` where
        the interval spans the bound, for the last model.
    """
    found = []
    for definition in readings[0]:
        own = [each[definition] for each in readings]
        models = [intervals(_statistics(each), resamples, seed) for each in own]
        last = models[-1]
        holds = {
            "two_phases": _verdict(last["two_phases"], 0.5),
            "entropy": _verdict(last["entropy"], 0.0),
        }
        row: dict[str, Any] = {
            **vars(definition),
            "models": [{key: value.as_json() for key, value in each.items()} for each in models],
        }
        if len(own) > 1:
            order = Difference(mean(own[0].area), mean(own[1].area))
            interval = intervals({"order": order}, resamples, seed)["order"]
            row["order"] = interval.as_json()
            holds["order"] = _verdict(interval, 0.0)
        found.append({**row, "holds": holds})
    return found


def _statistics(reading: Reading) -> dict[str, Statistic]:
    start = reading.variation[:, 0]
    return {
        "size": Median(reading.size),
        "area": mean(reading.area),
        "two_phases": Ratio(start - reading.variation[:, CONSTRUCTION_ENDS], start),
        "entropy": RankCorrelation(reading.area, reading.entropy),
    }


def _verdict(interval: Interval, bound: float) -> str:
    if float(interval.low) > bound:
        return "yes"
    return "no" if float(interval.high) < bound else "open"
