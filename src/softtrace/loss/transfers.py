"""Values between the CPU and a GPU, sent so that neither waits for the other.

Whoever reads a value from a GPU waits for all that it was given before. Right after a forward that
is the whole forward, and then the GPU waits in turn until it is given the backward pass. So what a
step looks at is chosen on the CPU, from copies of the batch that were begun before the forward, and
whether what was replayed is finite is asked a step later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softtrace.graph.batch import require_finite


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device; pinned memory spares waiting for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _event_on(device: torch.device) -> torch.cuda.Event:
    """An event on a device, which need not be the current one, after all it was given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _Copy(NamedTuple):
    """What was copied, as it was then, and the copy in pinned memory."""

    own: Tensor
    version: int
    copy: Tensor


class EarlyCopies:
    """Copies on the CPU of what a batch holds, begun before the forward that reads the batch too.

    Args:
        batch: any; the integers and booleans in it that are on CUDA are copied. None for nothing.
    """

    def __init__(self, batch: Mapping[str, Any] | None = None) -> None:
        self._known = [
            _Copy(each, each._version, each.to("cpu", non_blocking=True))
            for each in (() if batch is None else batch.values())
            if isinstance(each, Tensor)
            and each.is_cuda
            and not (each.is_floating_point() or each.is_inference())  # those have no version
        ]
        self._done = {
            device: _event_on(device) for device in {each.own.device for each in self._known}
        }

    def of(
        self, ids: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Ids and three others of a batch on the CPU: copied early, or else copied now."""
        found = self._of(ids)
        assert found is not None
        first, second, third = (self._of(each) for each in others)
        return found, first, second, third

    def _of(self, values: Tensor | None) -> Tensor | None:
        for each in self._known:
            if each.own is values and each.version == each.own._version:
                self._done[values.device].synchronize()
                return each.copy
        return values.cpu() if isinstance(values, Tensor) else values


class _Asked(NamedTuple):
    """A flag on its way to the CPU."""

    finite: Tensor
    arrived: torch.cuda.Event
    what: str
    step: int


class LaterChecks:
    """Whether what a GPU replayed was finite, said at the next step.

    What is not finite counts as nothing in the term itself, so nothing is lost meanwhile.
    """

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._step = 0

    def begin(self, step: int) -> None:
        """Read all that was asked, which has been there for long; from now on it is of this step.

        Raises:
            NonFiniteError: something was not finite, named by its step.
        """
        asked, self._asked, self._step = self._asked, [], step
        for each in asked:
            each.arrived.synchronize()
            require_finite(each.finite, f"step {each.step}: {each.what}")

    def ask(self, finite: Tensor, what: str) -> None:
        """Have it read later whether ``what`` was finite, a bool scalar on CUDA."""
        flag = finite.to("cpu", non_blocking=True)
        self._asked.append(_Asked(flag, _event_on(finite.device), what, self._step))
