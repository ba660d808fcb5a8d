"""Distortion over trace size, and what is read of it: the area, and the size at a bound of TV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softtrace.checks import check_range
from softtrace.tracing.masking import AttentionKind

SIZES: tuple[float, ...] = tuple(10 ** (-4 + 4 * step / 25) for step in range(26))
"""26 sizes, log-spaced from 1e-4 to 1: both of the :data:`PHASES`."""

PHASES = {"construction": (1e-4, 1e-2), "refinement": (1e-2, 1.0)}
"""The paper's two phases, as sizes of traces (shares of all edges) from and to."""

SIZE_BOUND = 0.2
"""TV of the size that a token is said to need, its "size at TV 0.2"."""

DEPTH_QUARTILES = 4

_SEQUENCES = {
    **dict.fromkeys(("size", "total_variation", "composition", "nucleus", "readings"), 1),
    **dict.fromkeys(("edges", "entropy"), 0),
}
"""Which dimension of the tensors of a :class:`DensityCurve` counts sequences; the next one counts
positions."""

_GRID = (
    0.337, 0.0652, 0.0381, 0.0289, 0.0166, 0.00716, 0.00307, 0.00131, 0.00056, 0.00018, 4.36e-05,
)  # fmt: skip


def default_thresholds() -> tuple[float, ...]:
    """11 thresholds, 0.34 to 4e-5, where the traces grow from 1e-4 of the graph to most of it.

    Found by coordinate descent on the error of readings of two pretrained models at 64, 256 and
    1,024 tokens, with recorded and recomputed attention, of one of them after fine-tuning, and of
    the shipped model. How far readings are off: ``recipes/benchmarks/results/thresholds.json``.
    """
    return _GRID


def fine_thresholds() -> tuple[float, ...]:
    """90 thresholds, 0.98 to 8e-7, evenly spaced by their logit: for readings of single sizes."""
    grid: list[float] = torch.linspace(4, -14, 90, dtype=torch.float64).sigmoid().tolist()
    return tuple(grid)


@dataclass(frozen=True)
class DensityCurve:
    """Distortion over trace size for every position of a batch.

    Attributes:
        thresholds: ``[K]``, falling.
        size: ``[K, B, T]`` share of |E| of the trace at each threshold; NaN at padding.
        total_variation: ``[K, B, T]`` in [0, 1]; NaN at padding.
        edges: ``[B, T]`` int64, |E| of each position; 0 at padding and where nothing is measured.
        entropy: ``[B, T]`` nats, of the full model's prediction.
        composition: ``[K + 1, B, T, Q, 4]`` number of edges by depth quartile and kind
            (``EDGE_KINDS``), the full graph last; None unless asked for.
        nucleus: ``[K + 1, B, T, P]`` bool, ordered top-p list recovered, the full graph (always
            True) last; None unless asked for.
        readings: ``[K + 1, B, T, X]`` what a caller's function read of the masked predictions, of
            the full one last; None unless asked for.
        attention: Where the masked runs took their attention probabilities from.
        exact: Whether each position was run with its own trace alone.
    """

    thresholds: Tensor
    size: Tensor
    total_variation: Tensor
    edges: Tensor
    entropy: Tensor
    composition: Tensor | None = None
    nucleus: Tensor | None = None
    readings: Tensor | None = None
    attention: AttentionKind = "recorded"
    exact: bool = True

    def __repr__(self) -> str:
        count, batch, length = self.size.shape
        return (
            f"DensityCurve({count} thresholds, {batch} x {length} tokens, "
            f"attention={self.attention!r}, exact={self.exact})"
        )

    def padded(self, length: int) -> DensityCurve:
        """The curve of sequences of so many tokens, of which the later ones are not measured."""
        missing = length - self.size.shape[2]
        if not missing:
            return self

        def pad(values: Tensor, dim: int, fill: float) -> Tensor:
            shape = [*values.shape[:dim], missing, *values.shape[dim + 1 :]]
            return torch.cat((values, values.new_full(shape, fill)), dim)

        unknown = ("size", "total_variation", "entropy")
        return self._each(
            lambda name, values, dim: pad(values, dim + 1, torch.nan if name in unknown else 0)
        )

    def beside(self, others: Sequence[DensityCurve]) -> DensityCurve:
        """The curve of the sequences of several curves, this one's first."""
        if not others:
            return self
        return self._each(
            lambda name, values, dim: torch.cat(
                (values, *(getattr(other, name) for other in others)), dim
            )
        )

    def filled(self, other: DensityCurve, places: Tensor) -> DensityCurve:
        """This curve with another's numbers at some places, ``[B, T]`` bool."""

        def chosen(name: str, values: Tensor, dim: int) -> Tensor:
            after = values.dim() - dim - 2
            there = places.reshape(*places.shape, *(1 for _ in range(after)))
            return torch.where(there, getattr(other, name), values)

        return self._each(chosen)

    def _each(self, function: Callable[[str, Tensor, int], Tensor]) -> DensityCurve:
        """The curve of a function of the name of each tensor, the tensor, and where sequences
        are counted in it."""
        found: dict[str, Any] = {
            name: function(name, values, dim)
            for name, dim in _SEQUENCES.items()
            if (values := getattr(self, name)) is not None
        }
        return replace(self, **found)

    def at_sizes(
        self, sizes: Iterable[float] | Tensor = SIZES, values: Tensor | None = None
    ) -> Tensor:
        """Read TV (or other per-threshold values) at given sizes, linear in log s.

        The full graph (size 1) has TV 0 by definition and closes the curve; an empty trace stands
        at half an edge. Below the smallest measured trace the value is held.

        Args:
            sizes: ``N`` shares in (0, 1], or a tensor ``[N, B, T]`` of shares in [0, 1] that gives
                each position its own.
            values: ``[K + 1, B, T, ...]``, the full graph last; None for TV.

        Returns:
            ``[N, B, T, ...]``.
        """
        log_size = self._log_size()
        if isinstance(sizes, Tensor) and sizes.dim() == 3:
            for bound in sizes.nan_to_num(1.0).aminmax():  # NaN stands at padding
                check_range("size", float(bound), 0.0, 1.0)
            query = sizes.to(log_size).log()
        else:
            wanted = [float(size) for size in sizes]
            for size in wanted:
                check_range("size", size, 0.0, 1.0, open_low=True)
            query = torch.tensor(wanted, dtype=log_size.dtype, device=log_size.device).log()
            query = query.reshape(-1, 1, 1).expand(-1, *log_size.shape[1:])
        if values is None:
            values = self._closed_variation()
        # searchsorted works along the last dimension.
        ordered = log_size.movedim(0, -1).contiguous()
        right = torch.searchsorted(ordered, query.movedim(0, -1).contiguous()).movedim(-1, 0)
        right = right.clamp(1, len(log_size) - 1)
        x0, x1 = log_size.gather(0, right - 1), log_size.gather(0, right)
        share = ((query - x0) / (x1 - x0).clamp_min(1e-12)).clamp(0, 1)
        extra = values.shape[3:]
        index = right.reshape(*right.shape, *(1 for _ in extra)).expand(*right.shape, *extra)
        y0, y1 = (values.to(share.dtype).gather(0, at) for at in (index - 1, index))
        return y0 + share.reshape(*share.shape, *(1 for _ in extra)) * (y1 - y0)

    def area(self) -> Tensor:
        """Mean TV over log10 s from 1e-4 to 1 (trapezoids on :data:`SIZES`), ``[B, T]``."""
        heights = self.at_sizes(SIZES)
        return (heights.sum(0) - (heights[0] + heights[-1]) / 2) / (len(SIZES) - 1)

    def size_at(self, total_variation: float = SIZE_BOUND) -> Tensor:
        """The smallest size with TV at or under a bound, ``[B, T]``: first crossing, log-linear.

        Where the trace at the highest threshold is under the bound already, its size: what a
        smaller one would give was not measured.

        Raises:
            InvalidInputError: The bound is outside (0, 1).
        """
        bound = check_range(
            "total_variation", total_variation, 0.0, 1.0, open_low=True, open_high=True
        )
        heights = self._closed_variation()
        log_size = self._log_size()
        first = (heights <= bound).int().argmax(0, keepdim=True)
        before = (first - 1).clamp_min(0)
        y0, y1 = heights.gather(0, before), heights.gather(0, first)
        x0, x1 = log_size.gather(0, before), log_size.gather(0, first)
        share = ((y0 - bound) / (y0 - y1).clamp_min(1e-12)).clamp(0, 1)
        crossing = (x0 + share * (x1 - x0)).exp()
        at_once = torch.cat((self.size, torch.ones_like(self.size[:1])))[:1]
        return torch.where(first == 0, at_once, crossing)[0]

    def _log_size(self) -> Tensor:
        """``[K + 1, B, T]``, rising; the empty trace at half an edge, the full graph appended."""
        floor = 0.5 / self.edges.clamp_min(1)
        size = torch.maximum(self.size, floor.to(self.size.dtype))
        return torch.cat((size, torch.ones_like(size[:1]))).log()

    def _closed_variation(self) -> Tensor:
        variation = self.total_variation
        return torch.cat((variation, torch.zeros_like(variation[:1])))


def by_quartile(counts: Tensor) -> Tensor:
    """``[B, T, L, 4]`` to ``[B, T, Q, 4]``: layer l belongs to quartile ⌊4·l / L⌋."""
    layers = counts.shape[2]
    quartile = torch.arange(layers, device=counts.device) * DEPTH_QUARTILES // layers
    summed = counts.new_zeros(*counts.shape[:2], DEPTH_QUARTILES, counts.shape[3])
    return summed.index_add_(2, quartile, counts)
