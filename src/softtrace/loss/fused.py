"""What a step runs as one compiled function: traced operation by operation, then fused.

A compiler that reads Python meets hooks, context variables and a second run of the same modules in
masked runs. What they compute is a fixed list of tensor operations all the same, backward pass
included, for no shape follows from a value: ``make_fx`` writes it down while it runs once, and
``torch.compile`` fuses the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Tensors = Sequence[Tensor | None]


def fused(
    run: Callable[[Sequence[Tensor]], Tensors], inputs: Sequence[Tensor], backend: str = "inductor"
) -> Callable[[], Tensors]:
    """A function without arguments: what ``run(inputs)`` gives, from the inputs as they are then.

    Args:
        run: of tensors of the inputs' shapes; may take gradients inside. Shapes and Python values
            must not follow from what the tensors hold.
        inputs: read in place at every call; gradients do not reach them.
        backend: of ``torch.compile``.
    """
    given = list(inputs)
    # A compiled model that runs as it is written, as in runs of ours, refuses to be traced.
    with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
        traced = make_fx(run)(given)
    compiled = torch.compile(traced, fullgraph=True, dynamic=False, backend=backend)

    def call() -> Any:
        # What autocast does is among the operations already.
        autocast_off = torch.autocast(given[0].device.type, enabled=False)
        # Around runs of ours a compiled model runs as it is written, and so would this.
        with torch.no_grad(), autocast_off, torch.compiler.set_stance("default"):
            return compiled(given)

    return call
