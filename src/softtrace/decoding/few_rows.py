"""Linear layers that read one to five tokens on a processor, where the usual product is slow.

A linear layer asks for ``x @ W.T``. For few rows of x MKL then reads W at a third to two thirds of
the memory's speed, slowest for two and three rows; asked for ``W @ x.T`` with two columns at least
it reads W about as fast as memory gives it. Decoding does nothing but read weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST = 5
"""Rows up to which this is faster, as measured in float32."""


def few_rows(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A forward ``[..., I]`` to ``[..., O]`` for a linear layer; equal up to rounding."""
    own = linear.forward

    def forward(read: Tensor) -> Tensor:
        # The product is as fast only where what it reads lies row by row.
        rows = read.reshape(-1, read.shape[-1]).contiguous()
        count = len(rows)
        if not 1 <= count <= MOST:
            return own(read)
        if count == 1:  # of one column only it would be the slow product again
            rows = torch.cat((rows, rows))
        found = torch.mm(linear.weight, rows.t())[:, :count].t().contiguous()
        if linear.bias is not None:
            found = found + linear.bias
        return found.reshape(*read.shape[:-1], linear.out_features)

    return forward


@contextmanager
def fast_few_rows(model: nn.Module) -> Iterator[None]:
    """Let a model's linear layers read few tokens faster, where they are float32 on a processor.

    Layers that are more than a linear layer (adapted, quantised, sharded) run as ever.
    """
    changed = [
        module for module in model.modules() if type(module) is nn.Linear and _is_plain(module)
    ]
    try:
        for linear in changed:
            vars(linear)["forward"] = few_rows(linear)
        yield
    finally:
        for linear in changed:
            vars(linear).pop("forward", None)


def _is_plain(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        "forward" not in vars(linear)
        and type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
    )
