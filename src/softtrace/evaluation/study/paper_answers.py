"""The figures of the paper as statistics of :class:`PaperReadings`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softtrace.density.components import gini, lorenz
from softtrace.density.paper import (
    COMMON_SIZES,
    DEPTH_GROUPS,
    NUCLEUS_TARGETS,
    first_size,
    on_common_sizes,
)
from softtrace.evaluation.bootstrap import (
    Difference,
    Interval,
    Median,
    Quantile,
    RankCorrelation,
    Ratio,
    Stack,
    Statistic,
    intervals,
    mean,
)
from softtrace.evaluation.study.answers import Unit
from softtrace.evaluation.study.paper import PaperReadings

COMPONENT_SIZES = (4e-4, 1e-3, 2e-3, 4e-3, 1e-2, 4e-2, 1e-1, 8e-1)
"""Sizes at which the paper shows how often traces go through each component."""

QUARTILES = (0.25, 0.5, 0.75)

AXES: dict[str, list[Any]] = {
    "sizes": list(COMMON_SIZES),
    "nucleus_k": list(NUCLEUS_TARGETS),
    "quartiles": list(QUARTILES),
    "kinds": ["attention", "mlp", "residual"],
    "depth_groups": list(range(1, DEPTH_GROUPS + 1)),
    "component_sizes": list(COMPONENT_SIZES),
}
"""What dimensions of answers run over."""


@dataclass(frozen=True)
class PaperAnswer:
    """One number, or array of numbers, of every model.

    Attributes:
        key: its name in ``paper.json``.
        name: what the table calls it.
        unit: of its numbers; ``"tokens"`` are ranks.
        axes: what its dimensions run over, of :data:`AXES`.
        of: makes the statistic from a model's readings.
    """

    key: str
    name: str
    unit: Unit
    axes: tuple[str, ...]
    of: Callable[[PaperReadings], Statistic]


def _answers() -> Iterator[PaperAnswer]:
    one, sizes = (), ("sizes",)
    yield PaperAnswer("loss", "loss", "nats", one, lambda r: mean(r.loss[:, -1:]))
    yield PaperAnswer("entropy", "entropy", "nats", one, lambda r: mean(r.entropy[:, None]))
    yield PaperAnswer("auc", "AUC (computation density)", "tv", one, lambda r: mean(r.auc[:, None]))
    name = "rank correlation of entropy and AUC"
    yield PaperAnswer("entropy_auc", name, "correlation", one, _entropy_auc)
    yield PaperAnswer("tv/trace", "TV of the trace", "tv", sizes, _curve("trace"))
    name = "TV of the rest of the model (inverse)"
    yield PaperAnswer("tv/inverse", name, "tv", sizes, _curve("inverse"))
    yield PaperAnswer("tv/random", "TV of a random subgraph", "tv", sizes, _curve("random"))
    name, both = "first size with nu of at least k", ("nucleus_k", "quartiles")
    yield PaperAnswer("nucleus", name, "share", both, _nucleus)
    yield PaperAnswer("kinds", "edges by kind", "share", ("sizes", "kinds"), _curve("kinds"))
    name, both = "edges by depth group", ("sizes", "depth_groups")
    yield PaperAnswer("depths", name, "share", both, _curve("depths"))
    name = "unigram frequency of the top-5 nucleus"
    yield PaperAnswer("frequency", name, "share", sizes, _curve("frequency"))
    yield PaperAnswer("true/loss", "loss of the true token", "nats", sizes, _curve("loss"))
    yield PaperAnswer("true/rank", "rank of the true token (median)", "edges", sizes, _rank)
    name = "traces connected to the input"
    yield PaperAnswer("connected", name, "share", sizes, _connected)
    name, axes = "smallest size connected to the input", ("quartiles",)
    yield PaperAnswer("connection", name, "share", axes, lambda r: _quartiles(r.connection))
    name, axes = "heads and MLPs that a trace goes through", ("component_sizes",)
    yield PaperAnswer("components/share", name, "share", axes, _component_share)
    name = "Gini coefficient of their frequency"
    yield PaperAnswer("components/gini", name, "tv", axes, _Gini)


def _curve(name: str) -> Callable[[PaperReadings], Statistic]:
    """Means over the inputs on the common sizes; NaN of an input takes no part."""

    def of(readings: PaperReadings) -> Statistic:
        values = on_common_sizes(readings.sizes, getattr(readings, name))
        known = ~values.isnan()
        return Ratio(values.nan_to_num(), known)

    return of


def _entropy_auc(readings: PaperReadings) -> Statistic:
    return RankCorrelation(readings.entropy[:, None], readings.auc[:, None])


def _quartiles(values: Tensor) -> Statistic:
    return Stack([Quantile(values[:, None], share) for share in QUARTILES])


def _nucleus(readings: PaperReadings) -> Statistic:
    firsts = [first_size(readings.sizes, readings.nucleus, k) for k in NUCLEUS_TARGETS]
    # The last dimension is the outer stack's.
    return Stack(
        [Stack([Quantile(each[:, None], share) for each in firsts]) for share in QUARTILES]
    )


def _rank(readings: PaperReadings) -> Statistic:
    values = on_common_sizes(readings.sizes, readings.rank)
    return Stack([Median(each[:, None]) for each in values.unbind(1)])


def _connected(readings: PaperReadings) -> Statistic:
    there = readings.connection[:, None] <= torch.tensor(COMMON_SIZES, dtype=torch.float64)
    return Ratio(there, torch.ones(len(there), 1))


def presence(readings: PaperReadings) -> Tensor:
    """``[N, 8, C]`` bool: which components the trace of each of :data:`COMPONENT_SIZES` holds."""
    return readings.entries[:, None] <= torch.tensor(COMPONENT_SIZES, dtype=torch.float64)[:, None]


def _component_share(readings: PaperReadings) -> Statistic:
    there = presence(readings)
    return Ratio(there.sum(-1), torch.full((len(there), 1), there.shape[-1]))


class _Gini:
    """Gini coefficient over the components of how many of the inputs' traces hold each."""

    def __init__(self, readings: PaperReadings) -> None:
        self._there = presence(readings).double()
        self.sequences, self.width = len(self._there), self._there[0].numel()

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R, 8]``; NaN where no trace holds any."""
        return gini(torch.einsum("rn,nsc->rsc", counts, self._there))


PAPER_ANSWERS = tuple(_answers())
"""All that ``study --paper`` answers, in the order of its table."""


def paper_results(
    found: Sequence[PaperReadings], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every answer for every model with its interval, and for two the second less the first.

    Args:
        found: readings of models on the same inputs.
        resamples, seed: of the bootstrap over inputs.
    """
    statistics = [{each.key: each.of(readings) for each in PAPER_ANSWERS} for readings in found]
    of_models = [intervals(each, resamples, seed) for each in statistics]
    changes: dict[str, Interval] = {}
    if len(found) == 2:
        before, after = statistics
        paired = {key: Difference(after[key], before[key]) for key in before}
        changes = intervals(paired, resamples, seed)
    return {
        each.key: {
            "name": each.name,
            "unit": each.unit,
            "axes": list(each.axes),
            "models": [one[each.key].as_json() for one in of_models],
            "difference": changes[each.key].as_json() if changes else None,
        }
        for each in PAPER_ANSWERS
    }


def component_results(readings: PaperReadings, names: Sequence[str]) -> dict[str, Any]:
    """How often the traces of each size go through each component, and the Lorenz curves.

    Args:
        readings: of a model.
        names: of its components.

    Returns:
        ``names``; ``frequency``, a list a size of shares of the inputs, by component; ``lorenz``,
        a list a size of cumulative shares, the most frequent first, None where no trace has any.
    """
    shares = presence(readings).double().mean(0)
    curves = lorenz(shares)
    return {
        "names": list(names),
        "frequency": shares.tolist(),
        "lorenz": [None if bool(each.isnan().any()) else each.tolist() for each in curves],
    }


def density_correlations(
    densities: Sequence[Tensor], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Rank correlation of the densities of the same tokens, between each two models.

    Args:
        densities: of each model ``[N, M]``, sequence by token.
        resamples, seed: of the bootstrap over sequences.

    Returns:
        A dict a pair: ``models``, their two places, and the correlation's ``value``, ``low`` and
        ``high``.
    """
    pairs = itertools.combinations(range(len(densities)), 2)
    statistics = {pair: RankCorrelation(*(densities[at] for at in pair)) for pair in pairs}
    if not statistics:
        return []
    named: dict[str, Statistic] = {f"{a} {b}": each for (a, b), each in statistics.items()}
    found = intervals(named, resamples, seed)
    return [
        {"models": list(pair), **found[f"{pair[0]} {pair[1]}"].as_json()} for pair in statistics
    ]
