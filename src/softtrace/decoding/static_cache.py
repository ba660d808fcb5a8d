"""A cache of fixed size that is cut by moving a pointer, each row of a batch by its own.

transformers' StaticCache has one length for all rows and, where attention slides, moves what it
holds, so that tokens cannot be taken out again. Here every layer keeps the whole text: a token's
keys and values lie at its position. What lies behind the pointer is not seen, since attention is
causal, and is written over by whatever is read there next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, masking_utils
from transformers.cache_utils import CacheLayerMixin

IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention of transformers that takes any mask."""


class PositionLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, ``[B, H_kv, C, d]``.

    Args:
        start: ``[B, 1]`` int64, the position of the first token of the current run; shared
            by all layers and moved by whoever runs the model.
        capacity: C, positions that there is room for.
    """

    is_compileable = True

    def __init__(self, start: Tensor, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start, self.capacity = start, capacity
        self.rows = torch.arange(len(start), device=start.device)[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for keys and values like these, for as many rows as ``start`` has."""

        def room(like: Tensor) -> Tensor:
            shape = (len(self.start), like.shape[1], self.capacity, like.shape[3])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``[B, H_kv, N, d]`` at positions ``start`` and after; all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self.start + torch.arange(key_states.shape[2], device=self.start.device)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        for held, new in ((keys, key_states), (values, value_states)):
            # inductor writes this in place; of scatter_ it makes a copy of all that is held.
            held[self.rows, :, places] = new.transpose(1, 2)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a query may see, and where they begin: all that there is room for."""
        return self.capacity, 0

    def get_seq_length(self) -> Any:
        """``start``, which transformers hands on to the mask as it is."""
        return self.start

    def get_max_length(self) -> int:
        """Positions that there is room for."""
        return self.capacity


def position_cache(layers: int, start: Tensor, capacity: int) -> Cache:
    """A cache for a model of so many layers; see :class:`PositionLayer`."""
    return Cache(layers=[PositionLayer(start, capacity) for _ in range(layers)])


def _visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor,
    mask_function: Any,
    device: Any,
) -> Tensor:
    """``[B, 1, N, C]`` bool, from the position of each row's first token, ``[B, 1]``."""
    queries = (q_offset + torch.arange(q_length, device=device))[:, None, :, None]
    keys = torch.arange(kv_length, device=device)[None, None, None, :]
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros((), dtype=torch.long, device=device)
    seen: Tensor = mask_function(rows, heads, queries, keys)
    return seen.expand(batch_size, 1, q_length, kv_length)


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    if not _by_position(kwargs):
        return masking_utils.sdpa_mask(*args, **kwargs)
    return _visible(**_asked(kwargs))


def _eager(*args: Any, **kwargs: Any) -> Any:
    if not _by_position(kwargs):
        return masking_utils.eager_mask(*args, **kwargs)
    dtype = kwargs["dtype"]
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=kwargs["device"])
    return torch.where(_visible(**_asked(kwargs)), torch.zeros_like(hidden), hidden)


def _by_position(kwargs: dict[str, Any]) -> bool:
    offset = kwargs.get("q_offset")
    return isinstance(offset, Tensor) and offset.dim() == 2


def _asked(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("batch_size", "q_length", "kv_length", "q_offset", "mask_function", "device")
    return {name: kwargs[name] for name in names}


@contextmanager
def masks_by_position() -> Iterator[None]:
    """Let transformers make masks for rows of different lengths, where a cache has them.

    The table of mask functions is the process's; other models get what they always got.
    """
    table: Any = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    own = {name: table._local_mapping.get(name) for name in IMPLEMENTATIONS}
    table["sdpa"], table["eager"] = _sdpa, _eager
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:
                del table[name]
            else:
                table[name] = before
