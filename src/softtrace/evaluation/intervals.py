"""Intervals of the numbers in ``density.json``, by bootstrap over the measured blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from softtrace.evaluation.bootstrap import Median, Statistic, intervals, mean
from softtrace.evaluation.measure import Measurements
from softtrace.metrics.functional import entropy_groups, half_depth

_LEAST = 2  # units, of which something can be drawn
_MOST = 2048  # each resample holds a count for each unit
RESAMPLES = 1000


def intervals_of(found: Measurements, blocks: int) -> dict[str, list[float]]:
    """Percentile intervals of measures, over resampled blocks (:mod:`~.bootstrap`).

    Which tokens are easy and hard is settled once, by the bounds of entropy of all tokens, and held
    fixed over the resamples: the intervals leave out what those bounds themselves could vary by. Of
    more than 2,048 blocks neighbours are drawn together, so that memory stays bounded.

    Args:
        found: of whole blocks, one after another.
        blocks: how many; each with the same number of explained tokens.

    Returns:
        ``[low, high]`` by the keys of :data:`~softtrace.report.tables.MEASURES`, all but the
        rank correlation's; NaN where no resample has such a token. Empty for a single block.
    """
    if blocks < _LEAST:
        return {}
    entropy = torch.cat(found.entropy)
    tokens = len(entropy) // blocks * math.ceil(blocks / _MOST)  # of a unit
    missing = -len(entropy) % tokens

    def by_unit(flat: Tensor) -> Tensor:
        return pad(flat, (0, missing)).reshape(-1, tokens)

    half = half_depth(len(found.agreement[0])) - 1
    values = {
        "size_at_tv_0.2": torch.cat(found.size),
        "area": torch.cat(found.area),
        "early_exit_half": torch.cat([part[half] for part in found.agreement]),
    }
    groups = {name: by_unit(rows) for name, rows in entropy_groups(entropy).items()}
    statistics: dict[str, Statistic] = {
        "loss_all": mean(by_unit(torch.cat(found.loss)), groups["all"])
    }
    for name, flat in values.items():
        each = by_unit(flat.double())
        for group, there in groups.items():
            statistics[f"{name}_{group}"] = (
                Median(each.masked_fill(~there, torch.nan))
                if name == "size_at_tv_0.2"
                else mean(each, there)
            )
    bounds = intervals(statistics, RESAMPLES, seed=0)
    return {key: [float(bound.low), float(bound.high)] for key, bound in bounds.items()}
