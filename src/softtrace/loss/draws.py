"""Random choices of a step, a pure function of (seed, step, rank) and of which tokens count.

Resuming needs no state.

The global random state is neither read nor moved, so a run with strength 0 stays bitwise that of a
run without the penalty.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softtrace.loss.transfers import sent
from softtrace.processes import in_group

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it fill [0, 1) evenly, however many they are


@dataclass(frozen=True)
class Draw:
    """What one step's term looks at: windows of a batch.

    Attributes:
        rows: which sequence each window is cut from, ``[n]`` int64.
        starts: its first token, ``[n]`` int64.
        thresholds: τ of each window, ``[n]`` float32.
        depths: E of each token, ``[n, window]`` int64.
    """

    rows: Tensor
    starts: Tensor
    thresholds: Tensor
    depths: Tensor

    def of(self, values: Tensor, window: int) -> Tensor:
        """The chosen windows ``[n, window]`` of ``[B, T]``."""
        inside = torch.arange(window, device=values.device)
        return values[self.rows[:, None], self.starts[:, None] + inside]


def draw(
    *,
    seed: int,
    step: tuple[int, int],
    rank: int,
    counted: Tensor,
    share: float,
    window: int,
    thresholds: tuple[float, float],
    depths: tuple[int, int],
) -> Draw | None:
    """Choose windows of a batch; a threshold for each and a depth for each token, stratified.

    Every row is cut into as many windows as fit, all rows at one random offset; windows without a
    counted token are no candidates.

    Args:
        seed: of the penalty.
        step: the global step, and which of its accumulated batches.
        rank: of the process.
        counted: ``[B, T]`` bool on the CPU, tokens that take part.
        share: of the candidates, in (0, 1]; at least one is taken.
        window: tokens of each, 1 to T.
        thresholds: bounds of the log-uniform τ.
        depths: bounds of the uniform E, both included.

    Returns:
        None if there is no candidate.
    """
    generator = torch.Generator().manual_seed(hashed_seed(seed, *step, rank))
    batch, length = counted.shape
    slots = length // window
    offset = int(torch.randint(length - slots * window + 1, (), generator=generator, device="cpu"))
    cut = counted[:, offset : offset + slots * window].reshape(batch, slots, window)
    rows, places = cut.any(-1).nonzero().T
    if not len(rows):
        return None
    count = max(1, round(share * len(rows)))
    order = torch.randperm(len(rows), generator=generator, device="cpu")[:count]
    low, high = (math.log(bound) for bound in thresholds)
    levels = low + (high - low) * _stratified(count, generator)
    layers = depths[0] + (depths[1] - depths[0] + 1) * _stratified(count * window, generator)
    return Draw(
        rows[order],
        offset + places[order] * window,
        levels.exp(),
        layers.long().clamp(max=depths[1]).reshape(count, window),
    )


@dataclass(frozen=True)
class ExitDraw:
    """Which tokens of a batch are read early.

    Attributes:
        places: ``[n]`` int64 numbers into ``[B·T]``, each used at most once; where not used, one
            of those that are.
        depths: ``[n]`` int64, after how many layers, ascending, **on the CPU**.
        used: ``[n]`` bool, which of them take part.
    """

    places: Tensor
    depths: Tensor
    used: Tensor

    def on(self, device: torch.device) -> ExitDraw:
        """The same draw on a device."""
        return replace(self, places=sent(self.places, device), used=sent(self.used, device))


def draw_exits(
    *,
    seed: int,
    step: tuple[int, int],
    rank: int,
    counted: Tensor,
    share: float,
    bounds: tuple[int, int],
) -> ExitDraw:
    """Choose tokens of a batch for early exits, and after how many layers each is read.

    ``n`` follows from the shape alone, so that what is captured can be replayed, and where fewer
    tokens count the rest is not used. What is used depends on the tokens that count alone, not on
    the padding around them.

    Args:
        seed, step, rank: see :func:`draw`.
        counted: ``[B, T]`` bool on the CPU, tokens that take part.
        share: of them that are chosen, in (0, 1]; at least one, if any counts.
        bounds: smallest and largest number of layers, both included; those of any number of tokens
            are spread evenly.
    """
    generator = torch.Generator().manual_seed(hashed_seed(seed, *step, rank, 1))
    total = counted.numel()
    count = max(1, round(share * total))
    # First what does not depend on the shape; of the keys a smaller batch has the first ones.
    start = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    keys = torch.rand(total, generator=generator, device="cpu")
    there = counted.flatten()
    # index_select: indexing with a tensor wakes every thread of the CPU, milliseconds each time
    own = keys.index_select(0, (there.cumsum(0) - 1).clamp_min_(0))
    first = _smallest(torch.where(there, own, 2.0), count)  # who counts, in random order
    wanted = (share * there.sum()).round().clamp(min=1)
    used = there.index_select(0, first) & (torch.arange(count, device="cpu") < wanted)
    first = torch.where(used, first, first[:1])  # what nobody counts is not even looked at
    low, high = bounds
    if low == high:
        return ExitDraw(first, torch.full((count,), low, device="cpu"), used)
    spread = (start + _GOLDEN * torch.arange(count, device="cpu")) % 1
    depths = (low + ((high - low + 1) * spread).long()).clamp(max=high)
    depths, ascending = depths.sort(stable=True)
    return ExitDraw(first.index_select(0, ascending), depths, used.index_select(0, ascending))


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Places of the smallest, as a stable sort gives them, in an eighth of its time.

    Keys are multiples of 2**-24, as float32 is drawn, so that place and key fit into one float64.
    """
    places = torch.arange(len(keys), device="cpu")
    return (keys.double() * 2**24 * len(keys) + places).topk(count, largest=False).indices


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number out of each of ``count`` equal strata of [0, 1), in random order."""
    inside = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    return (torch.randperm(count, generator=generator, device="cpu") + inside) / count


def hashed_seed(*parts: object) -> int:
    """A 63-bit seed for a combination of values; neighbours have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def rank() -> int:
    """The number of this process, by which draws differ."""
    return torch.distributed.get_rank() if in_group() else 0
