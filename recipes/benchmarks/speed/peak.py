"""The most memory that a call takes, its seconds, and what its result holds."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import Tensor

from tests.support.live_bytes import LiveBytes


class Peak:
    """The most bytes of tensors during a call, in GiB, beyond what was held before; seconds."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.live = LiveBytes()

    def __enter__(self) -> Peak:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.live.__enter__()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *how: Any) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - self.before
        else:
            self.live.__exit__(*how)
            peak = self.live.peak
        self.seconds = time.perf_counter() - self.began
        self.gib = peak / 2**30


def held_bytes(found: Any, known: set[int] | None = None) -> int:
    """Bytes of the tensors that a result holds, storages of several once."""
    known = set() if known is None else known
    if id(found) in known:
        return 0
    known.add(id(found))
    if isinstance(found, Tensor):
        storage = found.untyped_storage()
        address = storage.data_ptr()
        if address in known:
            return 0
        known.add(address)
        return storage.nbytes()
    if isinstance(found, tuple | list):
        return sum(held_bytes(each, known) for each in found)
    if hasattr(found, "__dict__"):
        inside = [*vars(found).values()]
        closure = getattr(getattr(found, "function", None), "__closure__", None) or ()
        inside += [cell.cell_contents for cell in closure]
        return sum(held_bytes(each, known) for each in inside)
    return 0
