"""Confidence intervals by bootstrap over sequences.

Tokens of one sequence share their context and are no independent observations, so whole sequences
are drawn with replacement. A resample is a row of counts, how often each sequence was drawn; every
statistic here is computed from counts for many resamples at once, and equals what it would give on
the tokens written out that often. Source: Efron and Tibshirani, An Introduction to the Bootstrap
(1993), chapters 8 (units that are drawn) and 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from softtrace.checks import check_least
from softtrace.errors import InvalidInputError

CONFIDENCE = 0.95
"""Share of the resamples between the two ends of an interval."""

_PORTION = 1 << 22  # numbers that a statistic may hold at a time: 32 MB


class Statistic(Protocol):
    """Something computed from sequences that were each drawn so many times."""

    sequences: int
    """N, the number of sequences to draw from."""

    width: int
    """Numbers held for one resample while it is computed."""

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R, N]`` float64 counts to ``[R, ...]`` float64; NaN where it is not defined."""


class Ratio:
    """Σ numerators / Σ denominators over the sequences drawn: means, shares.

    Args:
        numerators: ``[N, ...]`` sums over each sequence's tokens.
        denominators: ``[N, ...]``, broadcast against them: numbers of tokens, or of edges.
    """

    def __init__(self, numerators: Tensor, denominators: Tensor) -> None:
        self._parts = numerators.double(), denominators.double()
        self.sequences, self.width = len(numerators), max(1, numerators[0].numel())

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R, ...]``; NaN where the denominators add up to 0."""
        above, below = (torch.einsum("rn,n...->r...", counts, part) for part in self._parts)
        return above / below


def mean(values: Tensor, there: Tensor | None = None) -> Ratio:
    """The mean over all tokens of ``[N, M]`` or ``[N, M, ...]``, sequence by token.

    Args:
        values: numbers.
        there: ``[N, M]`` bool, which tokens take part (of ``[N, M]`` values); None for all.
    """
    if there is not None:
        return Ratio((values.double() * there).sum(1), there.sum(1))
    tokens = torch.full((len(values), *(1 for _ in values.shape[2:])), values.shape[1])
    return Ratio(values.double().sum(1), tokens)


class Quantile:
    """The smallest value that so large a share of all tokens does not exceed.

    Args:
        values: ``[N, M]``, sequence by token; NaN where a token does not take part.
        share: in (0, 1]; 0.5 gives the lower median, as ``torch.median`` takes it.
    """

    def __init__(self, values: Tensor, share: float) -> None:
        self.share = share
        self.sequences, self.width = len(values), values.numel()
        owner = torch.arange(len(values)).repeat_interleave(values.shape[1])
        flat = values.double().flatten()
        known = ~flat.isnan()
        self._ordered, order = flat[known].sort(stable=True)
        self._owner = owner[known][order]

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R]``; NaN where no token was drawn."""
        if not len(self._ordered):
            return torch.full_like(counts[:, 0], torch.nan)
        below = counts[:, self._owner].cumsum(-1)
        wanted = (self.share * below[:, -1:]).ceil()
        found = self._ordered[torch.searchsorted(below, wanted)[:, 0]]
        return torch.where(below[:, -1] > 0, found, torch.nan)


class Median(Quantile):
    """The lower median over all tokens.

    Args:
        values: see :class:`Quantile`.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values, 0.5)


class RankCorrelation:
    """Spearman's rank correlation over all tokens, ties at the mean of their ranks.

    Args:
        x, y: ``[N, M]``, sequence by token.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.sequences, self.width = len(x), x.numel()
        self._owner = torch.arange(len(x)).repeat_interleave(x.shape[1])
        self._levels = [_levels(values.flatten()) for values in (x, y)]

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R]``; NaN where all values of a resample are the same."""
        weight = counts[:, self._owner]
        total = weight.sum(-1, keepdim=True)
        first, second = (self._ranks(level, weight) - (total + 1) / 2 for level in self._levels)
        product = (weight * first * second).sum(-1)
        spread = (weight * first**2).sum(-1) * (weight * second**2).sum(-1)
        return product / spread.sqrt()  # where no rank differs 0 / 0, which is no correlation

    @staticmethod
    def _ranks(level: Tensor, weight: Tensor) -> Tensor:
        """``[R, n]`` ranks that the tokens would have, each written out ``weight`` times."""
        held = weight.new_zeros(len(weight), int(level.max()) + 1).index_add_(1, level, weight)
        return (held.cumsum(-1) - (held - 1) / 2)[:, level]


def _levels(values: Tensor) -> Tensor:
    """``[n]`` int64: how many of the values are smaller."""
    values = values.contiguous()  # torch warns of others
    return torch.searchsorted(values.sort().values, values)


class Difference:
    """One statistic less another, on the same sequences: their difference is paired.

    Args:
        after, before: statistics of as many sequences.

    Raises:
        InvalidInputError: of different numbers of sequences, which cannot be paired.
    """

    def __init__(self, after: Statistic, before: Statistic) -> None:
        if after.sequences != before.sequences:
            raise InvalidInputError(
                f"paired difference: found {before.sequences} and {after.sequences} sequences, "
                "expected the same sequences measured twice"
            )
        self._after, self._before = after, before
        self.sequences, self.width = after.sequences, after.width + before.width

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R, ...]``."""
        return self._after(counts) - self._before(counts)


class Stack:
    """Several statistics of the same sequences as one, along a new dimension of their results.

    Args:
        parts: of results of one shape.
        dim: of ``torch.stack``; the first one is that of the resamples. The last by default.
    """

    def __init__(self, parts: Sequence[Statistic], dim: int = -1) -> None:
        self._parts, self._dim = tuple(parts), dim
        self.sequences = parts[0].sequences
        self.width = sum(part.width for part in parts)

    def __call__(self, counts: Tensor) -> Tensor:
        """``[R, ..., number of parts]``, or the number of parts at ``dim``."""
        return torch.stack([part(counts) for part in self._parts], dim=self._dim)


@dataclass(frozen=True)
class Interval:
    """A number, or an array of them, with the ends of its percentile interval.

    Attributes:
        value: what the sequences themselves give, ``[...]`` float64.
        low, high: the 2.5th and the 97.5th percentile of the resamples, ``[...]``; NaN where no
            resample defines the statistic. Those that do not are left out.
    """

    value: Tensor
    low: Tensor
    high: Tensor

    def as_json(self) -> dict[str, object]:
        """``value``, ``low`` and ``high`` as numbers or nested lists."""
        return {name: getattr(self, name).tolist() for name in ("value", "low", "high")}


def intervals(
    statistics: Mapping[str, Statistic], resamples: int, seed: int
) -> dict[str, Interval]:
    """Percentile intervals of several statistics of the same sequences, from the same resamples.

    Args:
        statistics: by name, all of the same number of sequences.
        resamples: how often as many sequences as there are get drawn, with replacement.
        seed: of the draws; equal ones give equal intervals.

    Raises:
        InvalidInputError: fewer than 2 sequences, statistics of different sequences, or no
            resample.
    """
    check_least("resamples", resamples, 1)
    numbers = {statistic.sequences for statistic in statistics.values()}
    if len(numbers) != 1:
        raise InvalidInputError(
            f"statistics: found {sorted(numbers)} sequences, expected the same number in all"
        )
    counts = draw_counts(numbers.pop(), resamples, seed)
    return {name: _interval(statistic, counts) for name, statistic in statistics.items()}


def draw_counts(sequences: int, resamples: int, seed: int) -> Tensor:
    """``[R, N]`` float64: how often each sequence is in each resample; rows add up to N.

    Raises:
        InvalidInputError: fewer than 2 sequences, of which nothing can be resampled.
    """
    if sequences < 2:
        raise InvalidInputError(
            f"sequences: found {sequences}, a bootstrap over sequences needs at least 2; measure "
            "more blocks, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(sequences, (resamples, sequences), generator=generator)
    counts = torch.zeros(resamples, sequences, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def _interval(statistic: Statistic, counts: Tensor) -> Interval:
    rows = max(1, _PORTION // statistic.width)
    value = statistic(torch.ones(1, statistic.sequences, dtype=torch.float64))[0]
    # Room beforehand: small results that stay lie between large ones that go, and the heap grows.
    drawn = value.new_empty(len(counts), *value.shape)
    for part, place in zip(torch.split(counts, rows), torch.split(drawn, rows), strict=True):
        place.copy_(statistic(part))
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    flat = drawn.reshape(len(drawn), -1).numpy()
    found = np.full((2, flat.shape[1]), np.nan)
    known = ~np.isnan(flat).all(0)  # numpy warns of a column of nothing else
    found[:, known] = np.nanquantile(flat[:, known], ends, axis=0)
    low, high = (torch.from_numpy(end).reshape(value.shape) for end in found)
    return Interval(value, low, high)
