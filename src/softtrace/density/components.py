"""How often the traces of many inputs go through each head and MLP, and how unevenly.

Source: arXiv 2605.27033, its figure of component frequency; Lorenz, Methods of measuring the
concentration of wealth (1905), and Gini (1912) for what is read of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrace.errors import InvalidInputError
from softtrace.graph.orders import NEVER, Ranks


def component_names(layers: int, heads: int) -> list[str]:
    """Names in the order of :func:`component_entries`: ``L0H3``, and ``L0MLP`` after the heads."""
    return [
        name
        for layer in range(layers)
        for name in (*(f"L{layer}H{head}" for head in range(heads)), f"L{layer}MLP")
    ]


def component_entries(ranks: Ranks) -> Tensor:
    """How many edges an order takes until each head and MLP is among them.

    Args:
        ranks: of :mod:`softtrace.graph.orders`.

    Returns:
        ``[L·(H + 1)]`` int64, the heads of a layer and then its MLP; ``NEVER`` for one that cannot
        reach the output. A trace of n edges contains a component where this is at most n.
    """
    entries = [torch.cat((layer.attention.amin((1, 2)), layer.mlp.amin()[None])) for layer in ranks]
    first = torch.cat(entries)
    return torch.where(first == NEVER, first, first + 1)


def lorenz(shares: Tensor) -> Tensor:
    """Cumulative share of a total, the largest parts first.

    Args:
        shares: ``[..., C]``, parts of it, at least 0.

    Returns:
        ``[..., C + 1]`` float64 from 0 to 1; NaN where the total is 0.
    """
    _check(shares)
    ordered = shares.double().sort(dim=-1, descending=True).values
    total = ordered.sum(-1, keepdim=True)
    return torch.cat((torch.zeros_like(total), ordered.cumsum(-1)), dim=-1) / total


def gini(shares: Tensor) -> Tensor:
    """Gini coefficient: 0 where all parts are equal, 1 - 1/C where one has everything.

    Twice the area between the Lorenz curve and the diagonal.

    Args:
        shares: ``[..., C]``, at least 0.

    Returns:
        ``[...]`` float64; NaN where the total is 0.
    """
    curve = lorenz(shares)
    return 2 * torch.trapezoid(curve, dim=-1) / shares.shape[-1] - 1


def _check(shares: Tensor) -> None:
    if not shares.shape[-1] or bool((shares < 0).any()):
        least = float(shares.min()) if shares.numel() else "nothing"
        raise InvalidInputError(
            f"shares: found {tuple(shares.shape)}, the least of them {least}; expected at least "
            "one number, none below 0"
        )
