"""Random choices of a step, a pure function of (seed, step, rank): resuming needs no state.

The global random state is neither read nor moved, so a run with strength 0 stays bitwise that of a
run without the penalty.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What one step's term looks at.

    Attributes:
        rows: indices of the chosen sequences, ``[n]`` int64.
        start: first token of the crop.
        thresholds: τ of each chosen sequence, ``[n]`` float32.
        depths: E of each chosen sequence, ``[n]`` int64.
    """

    rows: Tensor
    start: int
    thresholds: Tensor
    depths: Tensor


def draw(
    *,
    seed: int,
    step: tuple[int, int],
    rank: int,
    rows: Tensor,
    share: float,
    room: int,
    thresholds: tuple[float, float],
    depths: tuple[int, int],
) -> Draw:
    """Choose a sub-batch and, stratified over it, a threshold and a depth for each sequence.

    Args:
        seed: of the penalty.
        step: the global step, and which of its accumulated batches.
        rank: of the process.
        rows: candidates, ``[R]``.
        share: of the candidates, in (0, 1]; at least one row is taken.
        room: largest start of the crop.
        thresholds: bounds of the log-uniform τ.
        depths: bounds of the uniform E, both included.
    """
    generator = torch.Generator().manual_seed(hashed_seed(seed, *step, rank))
    count = max(1, round(share * len(rows)))
    chosen = rows[
        torch.randperm(len(rows), generator=generator, device="cpu")[:count].to(rows.device)
    ]
    start = int(torch.randint(room + 1, (), generator=generator, device="cpu"))
    low, high = (math.log(bound) for bound in thresholds)
    levels = low + (high - low) * _stratified(count, generator)
    layers = depths[0] + (depths[1] - depths[0] + 1) * _stratified(count, generator)
    return Draw(
        chosen,
        start,
        levels.exp().to(rows.device),
        layers.long().clamp(max=depths[1]).to(rows.device),
    )


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number out of each of ``count`` equal strata of [0, 1), in random order."""
    inside = torch.rand(count, generator=generator, device="cpu")
    return (torch.randperm(count, generator=generator, device="cpu") + inside) / count


def hashed_seed(*parts: object) -> int:
    """A 63-bit seed for a combination of values; neighbours have nothing in common."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
