"""Densities along a model's own text as statistics of :class:`GenerationReadings`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from softtrace.evaluation.bootstrap import (
    Difference,
    Median,
    RankCorrelation,
    Stack,
    Statistic,
    mean,
)
from softtrace.evaluation.study.generation import (
    WRITERS,
    GenerationReadings,
    Writing,
    bins_of,
)
from softtrace.evaluation.study.results import Answer, Unit

OTHERS = WRITERS[1:]
"""What the model writes, of which the text is taken off."""

Of = Callable[[Writing, slice], Statistic]
"""A statistic of the new tokens at these places, counted from 0."""

_EVERY = slice(None)


def _answers() -> Iterator[Answer[GenerationReadings]]:
    for key, (name, unit, of) in _OF_TOKENS.items():
        yield Answer(f"overall/{key}", name, unit, ("writers",), _by_writer(of))
        less = f"{name}, less that of the text"
        yield Answer(f"overall/{key}_change", less, unit, ("others",), _less_text(of))
        yield Answer(f"along/{key}", name, unit, ("bins", "writers"), _along(_by_writer, of))
        yield Answer(f"along/{key}_change", less, unit, ("bins", "others"), _along(_less_text, of))
    for key, (name, of) in _OF_ORDER.items():
        yield Answer(f"order/{key}", name, "correlation", ("writers",), _by_writer(of))
        less = f"{name}, less that of the text"
        yield Answer(f"order/{key}_change", less, "correlation", ("others",), _less_text(of))


def _correlated(writing: Writing, places: slice) -> Statistic:
    tokens = writing.tokens
    return RankCorrelation(tokens.area[:, places], tokens.entropy[:, places])


def _neighbours(writing: Writing, places: slice) -> Statistic:
    area = writing.tokens.area[:, places]
    return RankCorrelation(area[:, :-1], area[:, 1:])


def _position(writing: Writing, places: slice) -> Statistic:
    area = writing.tokens.area[:, places]
    return RankCorrelation(area, torch.arange(area.shape[1]).expand_as(area))


_OF_TOKENS: dict[str, tuple[str, Unit, Of]] = {
    "area": ("area under distortion", "tv", lambda w, at: mean(w.tokens.area[:, at])),
    "size": (
        "edges needed (median size at TV 0.2)",
        "share",
        lambda w, at: Median(w.tokens.size[:, at]),
    ),
    "entropy": ("entropy", "nats", lambda w, at: mean(w.tokens.entropy[:, at])),
    "loss": ("loss", "nats", lambda w, at: mean(w.tokens.surprisal[:, at])),
    "area_entropy": ("rank correlation of area and entropy", "correlation", _correlated),
}
_OF_ORDER: dict[str, tuple[str, Of]] = {
    "neighbours": ("area of a token and of the next", _neighbours),
    "position": ("area and tokens since the prompt", _position),
}


def _by_writer(of: Of, places: slice = _EVERY) -> Callable[[GenerationReadings], Statistic]:
    return lambda r: Stack([of(r[writer], places) for writer in WRITERS])


def _less_text(of: Of, places: slice = _EVERY) -> Callable[[GenerationReadings], Statistic]:
    """Paired: each is what the model writes after the same prompts."""
    return lambda r: Stack(
        [Difference(of(r[writer], places), of(r["text"], places)) for writer in OTHERS]
    )


def _along(
    which: Callable[[Of, slice], Callable[[GenerationReadings], Statistic]], of: Of
) -> Callable[[GenerationReadings], Statistic]:
    """A statistic in each bin of the new tokens."""

    def statistic(readings: GenerationReadings) -> Statistic:
        bins = bins_of(readings["text"].tokens.area.shape[1])
        return Stack([which(of, slice(first - 1, last))(readings) for first, last in bins], dim=1)

    return statistic


GENERATION_ANSWERS = tuple(_answers())
"""All that ``study --generation`` answers, in the order of its table."""
