"""How many bytes of tensors are alive at one time, whatever the allocator does with them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SUMS = (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList)


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations make, from their birth to their end.

    Also what a sum makes for itself: a copy of its input in the dtype that it adds up in.

    Attributes:
        peak: most bytes that were alive at one time.
        largest: elements of the largest tensor that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _SUMS and args[0].dtype != made.dtype:
            self._peaked(self._alive + args[0].numel() * made.element_size(), args[0].numel())
        for output in made if isinstance(made, tuple | list) else (made,):
            if isinstance(output, Tensor) and not func.is_view:
                self._note(output)
        return made

    def _peaked(self, alive: int, elements: int) -> None:
        self.peak, self.largest = max(self.peak, alive), max(self.largest, elements)

    def _note(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        self._peaked(self._alive, made.numel())
        address = storage._cdata
        if address in self._known or made.device.type == "meta":
            return
        size = storage.nbytes()
        self._known.add(address)
        self._alive += size
        self._peaked(self._alive, made.numel())
        weakref.finalize(storage, self._end, address, size)

    def _end(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._alive -= size


def peak_bytes(function: Any, *args: Any, **options: Any) -> int:
    """Most bytes that a call has alive at one time beyond what was there before it."""
    with LiveBytes() as live:
        function(*args, **options)
    return live.peak
