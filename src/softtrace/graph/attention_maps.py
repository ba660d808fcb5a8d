"""One number for every attention edge of a layer, made block by block of targets.

A map ``[B, H, T, S]`` of every layer is what memory runs out of first: 30 layers of 9 heads at
8,192 tokens are 72 GB. All that is done with such a map is done target by target, so it is enough
to be able to make some of its rows. Where all layers' maps fit they are held whole: that is faster.

A fused kernel that keeps an edge by a bound on its score (FlexAttention, undone renormalisation and
all) is faster on a GPU, in bfloat16 by far. It is not used: it is compiled for every shape, serves
recorded attention alone, and in bfloat16 rounds scores otherwise than they were when sizes were
counted, so that edges at the threshold flip (``recipes/benchmarks/speed/flex.py`` measures both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

# Elements that exist at one time of a product or of a block of rows: 16 MiB in float32 stay in a
# CPU's caches; on a GPU 128 MiB, where a launch costs more than the memory.
CHUNK_ELEMENTS = 1 << 22
_MORE_ON_CUDA = 8

HELD_ELEMENTS = 1 << 28
"""Elements of the maps of all layers together, up to which they are held whole: 1 GiB in float32,
and four times that on a GPU, but no more than a sixteenth of its memory; less where a backward pass
keeps more than the maps (:func:`counted_as`)."""


def chunk_elements(device: torch.device) -> int:
    """Elements of a product that may exist at one time on a device."""
    return CHUNK_ELEMENTS * (_MORE_ON_CUDA if device.type == "cuda" else 1)


_COPIES: ContextVar[float] = ContextVar("softtrace_copies", default=1)


@contextmanager
def counted_as(copies: float) -> Iterator[None]:
    """Hold maps only where so many copies of them would fit, as a backward pass keeps several."""
    token = _COPIES.set(copies)
    try:
        yield
    finally:
        _COPIES.reset(token)


def none_held() -> AbstractContextManager[None]:
    """Hold no maps of all layers, however short the sequences are: less memory, more time."""
    return counted_as(math.inf)


def are_held(layers: int, shape: torch.Size, device: torch.device) -> bool:
    """Whether the maps of so many layers, ``[B, H, T, S]`` each, are held whole on a device."""
    most = HELD_ELEMENTS
    if device.type == "cuda":
        most = min(4 * most, torch.cuda.get_device_properties(device).total_memory // 64)
    return _COPIES.get() * layers * shape.numel() <= most


class Rows(NamedTuple):
    """Some targets of a map.

    Attributes:
        at: the targets, in rising order; a tensor of int64 or a slice.
        end: sources before this one are made; no target here has an edge from a later one.
    """

    at: slice | Tensor
    end: int

    def of(self, values: Tensor, dim: int = 1) -> Tensor:
        """The targets' part of ``values`` along a dimension."""
        if isinstance(self.at, Tensor):
            return values.index_select(dim, self.at)
        return values.narrow(dim, self.at.start, self.at.stop - self.at.start)

    def place(self, values: Tensor, found: Tensor) -> None:
        """Write what was found for the targets ``[B, n]`` into ``values`` ``[B, T]``."""
        values[:, self.at] = found

    def add_own(self, steps: Tensor, residual: Tensor) -> Tensor:
        """``[B, n, end]`` and a residual ``[B, T]`` of each target: an edge from itself."""
        targets = self.of(torch.arange(residual.shape[1], device=residual.device), 0)
        own = targets[None, :, None].expand(len(steps), -1, 1)
        return steps.scatter_add(2, own, self.of(residual)[..., None])

    def edges_of(self, seen: Tensor) -> Tensor:
        """``[B, n, end]`` of ``[B, T, S]``."""
        return self.of(seen)[..., : self.end]


class AttentionMap:
    """Base of all maps: a shape, a device, and rows.

    Attributes:
        shape: ``[B, H, T, S]`` of the whole map.
        device: on which rows are made.
        held: whether the whole map exists.
        targets: ``[n]`` int64 on the CPU, rising, outside of which nobody reads it; None for all.
    """

    shape: torch.Size
    device: torch.device
    held = False
    targets: Tensor | None = None

    def rows(self, rows: Rows) -> Tensor:
        """``[B, H, n, end]``, the numbers of some targets."""
        raise NotImplementedError

    def blocks(self, targets: Tensor | None = None) -> Iterator[Rows]:
        """Targets in blocks that may be made at one time.

        Args:
            targets: ``[n]`` int64 on the CPU, in rising order; None for all. Others are passed by.
        """
        batch, heads, length, sources = self.shape
        step = length if self.held else chunk_elements(self.device) // (batch * heads * sources)
        step = max(1, step)
        if targets is None:
            for start in range(0, length, step):
                stop = min(length, start + step)
                yield Rows(slice(start, stop), stop)
        elif len(targets):
            for part in torch.split(targets, step):
                first, last = int(part[0]), int(part[-1])
                whole = last - first == len(part) - 1
                yield Rows(slice(first, last + 1) if whole else part.to(self.device), last + 1)

    def hold(self) -> AttentionMap:
        """The same map, made at one go."""
        length = self.shape[2]
        return self if self.held else HeldMap(self.rows(Rows(slice(0, length), length)))

    def whole(self) -> Tensor:
        """All of it, ``[B, H, T, S]``; 0 where there is no edge."""
        found = [
            torch.nn.functional.pad(self.rows(rows), (0, self.shape[-1] - rows.end))
            for rows in self.blocks()
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)


class HeldMap(AttentionMap):
    """A map that is there already.

    Args:
        values: ``[B, H, T, S]``.
    """

    held = True

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.device = values.shape, values.device

    @override
    def rows(self, rows: Rows) -> Tensor:
        return rows.of(self.values, 2)[..., : rows.end]

    @override
    def whole(self) -> Tensor:
        return self.values


class EveryEdge(AttentionMap):
    """True where an edge exists.

    Args:
        seen: ``[B, T, S]`` bool.
        heads: number of heads, which all have the same edges.
    """

    def __init__(self, seen: Tensor, heads: int) -> None:
        self.seen = seen
        self.shape = torch.Size((len(seen), heads, *seen.shape[1:]))
        self.device = seen.device

    @override
    def rows(self, rows: Rows) -> Tensor:
        return rows.edges_of(self.seen)[:, None].expand(-1, self.shape[1], -1, -1)


class MadeFrom(AttentionMap):
    """A map whose rows are a function of the rows of another.

    Args:
        source: the other map.
        function: of its rows ``[B, H, n, end]`` and which rows they are.
        targets: see :class:`AttentionMap`; None for those of the other map.
    """

    def __init__(
        self,
        source: AttentionMap,
        function: Callable[[Tensor, Rows], Tensor],
        targets: Tensor | None = None,
    ) -> None:
        self.source, self.function = source, function
        self.shape, self.device = source.shape, source.device
        self.targets = source.targets if targets is None else targets

    @override
    def rows(self, rows: Rows) -> Tensor:
        return self.rows_from(self.source, self.source.rows(rows), rows)

    def rows_from(self, map_: AttentionMap, values: Tensor, rows: Rows) -> Tensor:
        """The same, where the rows of ``map_``, from which this map is made, are there already."""
        if map_ is not self.source:
            assert isinstance(self.source, MadeFrom)
            values = self.source.rows_from(map_, values, rows)
        return self.function(values, rows)

    def is_made_from(self, map_: AttentionMap) -> bool:
        """Whether ``map_`` is what this map is made from in the end."""
        source = self.source
        return source is map_ or (isinstance(source, MadeFrom) and source.is_made_from(map_))


class _Moved(AttentionMap):
    """A map whose rows are made on another device than they are used."""

    def __init__(self, source: AttentionMap, device: torch.device) -> None:
        self.source, self.device = source, device
        self.shape, self.targets = source.shape, source.targets

    @override
    def rows(self, rows: Rows) -> Tensor:
        at = rows.at.to(self.source.device) if isinstance(rows.at, Tensor) else rows.at
        return self.source.rows(Rows(at, rows.end)).to(self.device)


def on_device(map_: AttentionMap, device: torch.device) -> AttentionMap:
    """A map as one on that device reads it."""
    if map_.device == device:
        return map_
    return HeldMap(map_.whole().to(device)) if map_.held else _Moved(map_, device)


def as_map(values: Tensor | AttentionMap) -> AttentionMap:
    """A map as it is, a tensor ``[B, H, T, S]`` as one that is held."""
    return HeldMap(values) if isinstance(values, Tensor) else values


def each_block(
    map_: AttentionMap,
    function: Callable[[Tensor, Rows], Tensor],
    targets: Tensor | None = None,
) -> Iterator[tuple[Rows, Tensor]]:
    """A function of every block of rows, beside the rows that it was applied to.

    With gradients a block's rows are made anew in the backward pass, unless the map is held.

    Args:
        map_: whose rows ``[B, H, n, end]`` the function takes.
        function: what shall be made of them.
        targets: see :meth:`AttentionMap.blocks`.
    """

    def of(rows: Rows) -> Tensor:
        return function(map_.rows(rows), rows)

    for rows in map_.blocks(targets):
        if torch.is_grad_enabled() and not map_.held:
            made = checkpoint(of, rows, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(made, Tensor)
            yield rows, made
        else:
            yield rows, of(rows)
