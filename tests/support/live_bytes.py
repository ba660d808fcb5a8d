"""How many bytes of tensors are alive at one time, whatever the allocator does with them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations make, from their birth to their end.

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
        for output in made if isinstance(made, tuple | list) else (made,):
            if isinstance(output, Tensor) and not func.is_view:
                self._note(output)
        return made

    def _note(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        self.largest = max(self.largest, made.numel())
        address = storage._cdata
        if address in self._known or made.device.type == "meta":
            return
        size = storage.nbytes()
        self._known.add(address)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._end, address, size)

    def _end(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._alive -= size


def peak_bytes(function: Any, *args: Any, **options: Any) -> int:
    """Most bytes that a call has alive at one time beyond what was there before it."""
    with LiveBytes() as live:
        function(*args, **options)
    return live.peak
