"""The numbers of a result, whatever it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat(found: Any) -> Tensor:
    """Every number of a metric's or a collection's result, ``[n]`` float64 in a fixed order."""
    if isinstance(found, Tensor):
        return found.double().flatten()
    return torch.cat([flat(found[name]) for name in sorted(found)])


def in_order(values: Any) -> list[float]:
    """Every number of what JSON holds, in order."""
    if isinstance(values, dict | list):
        inside = values.values() if isinstance(values, dict) else values
        return [number for each in inside for number in in_order(each)]
    return [float(values)] if isinstance(values, int | float) else []
