"""What the metrics compute, as pure functions of readings: one number, bool or row a token.

Easy and hard tokens are the shares with the lowest and the highest entropy of the full model's
prediction, over all tokens that are given: never of a batch. Source: arXiv 2605.27033, sections 4
and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softtrace.checks import check_range

EASY_SHARE = 0.25
GROUPS = ("all", "easy", "hard")


def quantiles(values: Tensor, shares: Sequence[float]) -> tuple[Tensor, ...]:
    """Quantiles, linear between the two nearest, as ``torch.quantile``.

    That one refuses more than 2^24 values.

    Args:
        values: ``[n]``, n >= 1.
        shares: in [0, 1].

    Returns:
        A float64 scalar for each share.
    """
    ordered = values.double().sort().values
    last = len(ordered) - 1

    def at(share: float) -> Tensor:
        low = min(last, int(share * last))
        high = min(last, low + 1)
        return ordered[low].lerp(ordered[high], share * last - low)

    return tuple(at(share) for share in shares)


def entropy_bounds(entropy: Tensor, easy_share: float = EASY_SHARE) -> tuple[Tensor, Tensor]:
    """The quantiles of the entropies that easy tokens are under and hard ones over.

    Args:
        entropy: ``[n]`` nats, n >= 1.
        easy_share: of the tokens, in (0, 1].
    """
    check_range("easy_share", easy_share, 0.0, 1.0, open_low=True)
    low, high = quantiles(entropy, (easy_share, 1 - easy_share))
    return low, high


def entropy_groups(entropy: Tensor, easy_share: float = EASY_SHARE) -> dict[str, Tensor]:
    """``[n]`` bool for "all", "easy" and "hard"; see :func:`entropy_bounds`.

    Args:
        entropy: ``[n]`` nats, n >= 1.
        easy_share: of the tokens, in (0, 1].
    """
    low, high = entropy_bounds(entropy, easy_share)
    values = entropy.double()
    return {"all": torch.ones_like(values, dtype=torch.bool), "easy": values <= low,
            "hard": values >= high}  # fmt: skip


def computation_density(
    entropy: Tensor, area: Tensor, size: Tensor, easy_share: float = EASY_SHARE
) -> dict[str, Tensor]:
    """Mean area and median size of all, easy and hard tokens.

    Args:
        entropy: ``[n]`` nats.
        area: ``[n]`` mean TV over log10 of the size.
        size: ``[n]`` shares of all edges, at one bound of TV.
        easy_share: of the tokens, in (0, 1].

    Returns:
        ``area_all``, ``area_easy``, ``area_hard``, ``size_all``, ...: float64 scalars, NaN without
        a token.
    """
    if not len(entropy):
        unknown = _unknown(entropy)
        return {f"{name}_{group}": unknown for name in ("area", "size") for group in GROUPS}
    groups = entropy_groups(entropy, easy_share)
    return {
        **{f"area_{name}": area.double()[rows].mean() for name, rows in groups.items()},
        **{f"size_{name}": size.double()[rows].median() for name, rows in groups.items()},
    }


def half_depth(layers: int) -> int:
    """How many layers half the depth is: rounded down, at least 1."""
    return max(1, layers // 2)


def early_exit_agreement(
    entropy: Tensor, agreed: Tensor, easy_share: float = EASY_SHARE
) -> dict[str, Tensor]:
    """Share of the tokens whose exit after each layer says what the full model says.

    Args:
        entropy: ``[n]`` nats.
        agreed: ``[n, L]`` bool; the last layer is the full model.
        easy_share: of the tokens, in (0, 1].

    Returns:
        ``all``, ``easy``, ``hard``: ``[L]`` float64, NaN without a token.
    """
    shares = agreed.double()
    if not len(entropy):
        return dict.fromkeys(GROUPS, shares.mean(0))
    groups = entropy_groups(entropy, easy_share)
    return {name: shares[rows].mean(0) for name, rows in groups.items()}


def density_uncertainty_correlation(
    entropy: Tensor, area: Tensor, size: Tensor
) -> dict[str, Tensor]:
    """Spearman's rank correlation of area and of size with the entropy, over all tokens at once.

    Args:
        entropy, area, size: ``[n]``, as in :func:`computation_density`.

    Returns:
        ``area`` and ``size``: float64 scalars in [-1, 1]; 0 where all values of one of them are
        equal, NaN for fewer than two tokens.
    """
    if len(entropy) < 2:
        return dict.fromkeys(("area", "size"), _unknown(entropy))
    return {
        name: _rank_correlation(values, entropy)
        for name, values in (("area", area), ("size", size))
    }


def _rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, in float64: torchmetrics' ranks are float32, and stop being exact at 2^24."""
    first, second = (ranks - ranks.mean() for ranks in map(mid_ranks, (one, other)))
    size = (first.square().sum() * second.square().sum()).sqrt()
    found = (first * second).sum() / size
    return torch.where(size > 0, found, 0.0).clamp(-1, 1)


def mid_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, ties at their mean: ``[..., V]`` float64."""
    ordered, order = values.sort(dim=-1)
    place = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    first = torch.where(new, place, 0).cummax(-1).values
    ends = torch.where(new.roll(-1, -1), place, values.shape[-1])
    last = ends.flip(-1).cummin(-1).values.flip(-1)
    ranks = (first + last).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def _unknown(like: Tensor) -> Tensor:
    """NaN as a float64 scalar, on the device of ``like``."""
    return torch.full((), torch.nan, dtype=torch.float64, device=like.device)


def nucleus_recovery(recovered: Tensor, tokens: Tensor) -> Tensor:
    """Share of the tokens whose ordered top-p list is recovered, for each size and p.

    Args:
        recovered: ``[S, P]`` float64, summed over the tokens.
        tokens: how many, int64 scalar.
    """
    return recovered / tokens


def trace_composition(edges: Tensor) -> Tensor:
    """Shares of the edges of traces by depth quartile and kind, for each size.

    Args:
        edges: ``[S, Q, 4]`` float64 numbers of edges, summed over the tokens.

    Returns:
        ``[S, Q, 4]``, adding up to 1 for each size; kinds in the order of
        :data:`softtrace.graph.edges.EDGE_KINDS`.
    """
    return edges / edges.sum((1, 2), keepdim=True).clamp_min(torch.finfo(edges.dtype).tiny)
