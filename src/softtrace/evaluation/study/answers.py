"""The paper's questions as statistics of readings: what each is called, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softtrace.density.curve import PHASES
from softtrace.evaluation.bootstrap import (
    Difference,
    Median,
    RankCorrelation,
    Ratio,
    Stack,
    Statistic,
    mean,
)
from softtrace.evaluation.study.readings import STUDY_SIZES, Computation, Readings
from softtrace.evaluation.study.results import Answer, Unit
from softtrace.evaluation.study.unigrams import READINGS
from softtrace.percent import brief_percent

_CHANGE = PHASES["construction"][1]
CONSTRUCTION_ENDS = STUDY_SIZES.index(_CHANGE)
"""The place in :data:`STUDY_SIZES` of the size at which construction ends."""


def _answers() -> Iterator[Answer[Readings]]:
    yield Answer("overall/loss", "loss", "nats", (), lambda r: mean(r.whole.surprisal))
    yield Answer("overall/entropy", "entropy", "nats", (), lambda r: mean(r.whole.entropy))
    yield Answer("overall/area", "area under distortion", "tv", (), lambda r: mean(r.whole.area))
    name = "edges needed (median size at TV 0.2)"
    yield Answer("overall/size", name, "share", (), lambda r: Median(r.whole.size))

    yield Answer("phases/tv", "mean TV", "tv", ("sizes",), lambda r: _mean_of(r, r.variation))
    name = f"share of the fall of TV that comes below {brief_percent(_CHANGE)} of the edges"
    yield Answer("phases/construction", name, "share", (), _construction)
    name = "edges by depth quartile and kind"
    yield Answer("phases/edges", name, "share", ("sizes", "depth_quartiles", "kinds"), _edges)
    yield Answer("phases/kinds", "edges by kind", "share", ("sizes", "kinds"), _edges_by(2))
    name, axes = "edges by depth quartile", ("sizes", "depth_quartiles")
    yield Answer("phases/depths", name, "share", axes, _edges_by(3))
    name, axes = "top-p lists recovered", ("sizes", "nucleus_p")
    yield Answer("phases/nucleus", name, "share", axes, lambda r: _mean_of(r, r.nucleus))

    for what in ("size", "area"):
        for against in ("entropy", "surprisal"):
            key, name = f"uncertainty/{what}_{against}", f"{_NAMES[what]} and {against}"
            yield Answer(key, name, "correlation", (), _correlated(what, against))

    units: tuple[Unit, ...] = ("nats", "correlation")
    names = "KL of the prediction from the unigrams", "rank correlation with the unigrams"
    for index, (key, name, unit) in enumerate(zip(READINGS, names, units, strict=True)):
        yield Answer(f"shallow/{key}", name, unit, ("sizes",), _unigram(index))
        change = f"{name}, smallest trace less full model"
        yield Answer(f"shallow/{key}_change", change, unit, (), _unigram_change(index))

    for what, unit in _BY_LENGTH.items():
        yield Answer(f"length/{what}", _NAMES[what], unit, ("lengths",), _by_length(what))
        name = f"{_NAMES[what]}, longest less shortest"
        yield Answer(f"length/{what}_change", name, unit, (), _length_change(what))

    for what in ("size", "edges", "area"):
        axes, unit = ("positions", "contexts"), _BY_LENGTH[what]
        yield Answer(f"position/{what}", _NAMES[what], unit, axes, _by_position(what))
        key, name = f"position/{what}_spearman", f"{_NAMES[what]} and position"
        yield Answer(key, name, "correlation", ("contexts",), _with_position(what))


_NAMES = {
    "size": "edges needed (median size at TV 0.2)",
    "edges": "their number (median)",
    "area": "area under distortion",
    "attention": "attention among the edges needed",
    "surprisal": "loss",
}
_BY_LENGTH: dict[str, Unit] = {
    "size": "share",
    "edges": "edges",
    "area": "tv",
    "attention": "share",
    "surprisal": "nats",
}


def _mean_of(readings: Readings, sums: Tensor) -> Statistic:
    """Mean over tokens of ``[N, 25, ...]`` sums over each sequence's tokens."""
    tokens = readings.whole.size.shape[1]
    return Ratio(sums, torch.full((len(sums), *(1 for _ in sums.shape[1:])), tokens))


def _construction(readings: Readings) -> Statistic:
    """TV falls to 0 at the full graph, so what it is at the smallest size is the whole fall."""
    start = readings.variation[:, 0]
    return Ratio(start - readings.variation[:, CONSTRUCTION_ENDS], start)


def _edges(readings: Readings) -> Statistic:
    edges = readings.composition
    return Ratio(edges, edges.sum((2, 3), keepdim=True))


def _edges_by(other: int) -> Callable[[Readings], Statistic]:
    """The shares of :func:`_edges`, added up over a dimension of the readings' edges."""

    def of(readings: Readings) -> Statistic:
        edges = readings.composition.sum(other)
        return Ratio(edges, edges.sum(2, keepdim=True))

    return of


def _of_tokens(what: str, found: Computation) -> Statistic:
    """Medians of what is spread over powers of ten, means of the rest."""
    values: Tensor = getattr(found, what)
    if what in ("size", "edges"):
        return Median(values)
    return mean(values.nan_to_num(), ~values.isnan())


def _correlated(what: str, against: str) -> Callable[[Readings], Statistic]:
    return lambda r: RankCorrelation(getattr(r.whole, what), getattr(r.whole, against))


def _unigram(index: int) -> Callable[[Readings], Statistic]:
    return lambda r: _mean_of(r, r.unigram[:, :, index])


def _unigram_change(index: int) -> Callable[[Readings], Statistic]:
    full = len(STUDY_SIZES) - 1
    return lambda r: _mean_of(r, r.unigram[:, 0, index] - r.unigram[:, full, index])


def _by_length(what: str) -> Callable[[Readings], Statistic]:
    return lambda r: Stack([_of_tokens(what, found) for found in r.windows.values()])


def _length_change(what: str) -> Callable[[Readings], Statistic]:
    def of(readings: Readings) -> Statistic:
        lengths = sorted(readings.windows)
        longest, shortest = (readings.windows[lengths[at]] for at in (-1, 0))
        return Difference(_of_tokens(what, longest), _of_tokens(what, shortest))

    return of


def _contexts(readings: Readings) -> list[Computation]:
    """All windows, then the tokens with all that stands before them."""
    return [*readings.windows.values(), readings.whole_at_ends()]


def _by_position(what: str) -> Callable[[Readings], Statistic]:
    def of(readings: Readings) -> Statistic:
        def at(found: Computation, place: int) -> Statistic:
            part = slice(place, place + 1)
            only = Computation(**{name: values[:, part] for name, values in vars(found).items()})
            return _of_tokens(what, only)

        places = range(len(readings.ends))
        # The last dimension is the outer stack's.
        return Stack(
            [Stack([at(found, place) for place in places]) for found in _contexts(readings)]
        )

    return of


def _with_position(what: str) -> Callable[[Readings], Statistic]:
    def of(readings: Readings) -> Statistic:
        contexts = _contexts(readings)
        position = readings.ends.expand_as(contexts[0].size)
        return Stack([RankCorrelation(position, getattr(found, what)) for found in contexts])

    return of


ANSWERS = tuple(_answers())
"""All that the study answers, in the order of the questions."""
