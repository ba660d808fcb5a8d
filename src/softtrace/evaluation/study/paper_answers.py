"""The figures of the paper as statistics of :class:`PaperReadings`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
    Median,
    Quantile,
    RankCorrelation,
    Ratio,
    Stack,
    Statistic,
    intervals,
    mean,
)
from softtrace.evaluation.study.paper import PaperReadings
from softtrace.evaluation.study.results import Answer

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


def _answers() -> Iterator[Answer[PaperReadings]]:
    one, sizes = (), ("sizes",)
    yield Answer("loss", "loss", "nats", one, lambda r: mean(r.loss[:, -1:]))
    yield Answer("entropy", "entropy", "nats", one, lambda r: mean(r.entropy[:, None]))
    yield Answer("auc", "AUC (computation density)", "tv", one, lambda r: mean(r.auc[:, None]))
    name = "rank correlation of entropy and AUC"
    yield Answer("entropy_auc", name, "correlation", one, _entropy_auc)
    yield Answer("tv/trace", "TV of the trace", "tv", sizes, _curve("trace"))
    name = "TV of the rest of the model (inverse)"
    yield Answer("tv/inverse", name, "tv", sizes, _curve("inverse"))
    yield Answer("tv/random", "TV of a random subgraph", "tv", sizes, _curve("random"))
    name, both = "first size with nu of at least k", ("nucleus_k", "quartiles")
    yield Answer("nucleus", name, "share", both, _nucleus)
    yield Answer("kinds", "edges by kind", "share", ("sizes", "kinds"), _curve("kinds"))
    name, both = "edges by depth group", ("sizes", "depth_groups")
    yield Answer("depths", name, "share", both, _curve("depths"))
    name = "unigram frequency of the top-5 nucleus"
    yield Answer("frequency", name, "share", sizes, _curve("frequency"))
    yield Answer("true/loss", "loss of the true token", "nats", sizes, _curve("loss"))
    yield Answer("true/rank", "rank of the true token (median)", "edges", sizes, _rank)
    name = "traces connected to the input"
    yield Answer("connected", name, "share", sizes, _connected)
    name, axes = "smallest size connected to the input", ("quartiles",)
    yield Answer("connection", name, "share", axes, lambda r: _quartiles(r.connection))
    name, axes = "heads and MLPs that a trace goes through", ("component_sizes",)
    yield Answer("components/share", name, "share", axes, _component_share)
    name = "Gini coefficient of their frequency"
    yield Answer("components/gini", name, "tv", axes, _Gini)


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
    return Stack([_quartiles(first) for first in firsts], dim=1)


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
    pairs = list(itertools.combinations(range(len(densities)), 2))
    if not pairs:
        return []
    statistics = {str((a, b)): RankCorrelation(densities[a], densities[b]) for a, b in pairs}
    found = intervals(statistics, resamples, seed)
    return [{"models": list(pair), **found[str(pair)].as_json()} for pair in pairs]
