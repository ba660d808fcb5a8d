"""Distances of many predictions from others, a few at a time.

A distance takes several copies of its logits in float32, and keeps some for its backward pass. With
a vocabulary of 262,144 tokens each copy of a thousand predictions is a gigabyte. A few at a time,
each with its backward pass at once, leave one gradient in the logits' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Distance = Callable[[Tensor, Tensor], Tensor]
"""``(full [n, V], masked [n, V]) -> distances [n]``, each of its own two predictions alone."""

AT_ONCE = 2**26
"""Logits that are compared at a time: 256 MB a copy."""


def rows_at_once(logits: int) -> int:
    """How many rows of so many logits each are worked on at a time, at least one."""
    return max(1, AT_ONCE // logits)


def distances(distance: Distance, full: Tensor, masked: Tensor, rows: int | None = None) -> Tensor:
    """``distance(full, masked)``, computed for some predictions at a time.

    Gradients reach ``masked`` alone and are kept in its dtype. What fits at once is not cut.

    Args:
        distance: differentiable in its second argument.
        full: logits ``[N, V]``, held constant.
        masked: logits ``[N, V]``.
        rows: how many predictions; None for :func:`rows_at_once`.

    Returns:
        ``[N]``.
    """
    rows = rows_at_once(masked.shape[-1]) if rows is None else rows
    if len(masked) <= rows:
        return distance(full, masked)
    if not (torch.is_grad_enabled() and masked.requires_grad):
        parts = zip(torch.split(full, rows), torch.split(masked, rows), strict=True)
        return torch.cat([distance(*part) for part in parts])
    found: Tensor = _InChunks.apply(distance, full.detach(), masked, rows)  # type: ignore[no-untyped-call]
    return found


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: Distance, full: Tensor, masked: Tensor, rows: int) -> Tensor:
        gradient, found = torch.empty_like(masked), []
        for start in range(0, len(masked), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                own = masked[part].detach().requires_grad_()
                each = distance(full[part], own)
                gradient[part] = torch.autograd.grad(each.sum(), own)[0]
            found.append(each.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[None, None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * by.to(gradient.dtype)[:, None], None
