"""Identity 3: one masked run serves every position, so a grid of runs gives every density curve.

All edges of importance >= τ are kept everywhere; the output at position t then depends only on the
kept edges that reach t, and those are t's own s-Trace at threshold τ. This is exact because masked
runs use the attention probabilities of the full run (see :mod:`softtrace.tracing.masking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrace.checks import check_range
from softtrace.density.distortion import NUCLEUS_SHARES, entropy, nucleus_recovered, variation_from
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EdgeImportance
from softtrace.graph.importance import working_dtype
from softtrace.graph.masks import hard_masks
from softtrace.graph.sizes import edge_counts, total_edges
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.recording import Recording

SIZES: tuple[float, ...] = tuple(10 ** (-4 + 4 * step / 25) for step in range(26))
"""26 sizes, log-spaced from 1e-4 to 1: both of the :data:`PHASES`."""

PHASES = {"construction": (1e-4, 1e-2), "refinement": (1e-2, 1.0)}
"""The paper's two phases, as sizes of traces (shares of all edges) from and to."""

SIZE_BOUND = 0.2
"""TV of the size that a token is said to need, its "size at TV 0.2"."""

DEPTH_QUARTILES = 4

_CACHED = 1 << 19  # logits that a processor's cache holds while they are compared
_PORTION = 1 << 26  # logits that fit beside a model on an accelerator


_GRID = (
    *(0.448, 0.343, 0.161, 0.0987, 0.0723),
    *(0.0484, 0.0388, 0.0284, 0.019, 0.0102, 0.0046),
)


def default_thresholds() -> tuple[float, ...]:
    """11 thresholds, 0.448 to 0.0046, where the traces grow from 1e-4 of the graph to most of it.

    Found by coordinate descent on the error of readings against 150 thresholds, for two models at
    once: the shipped one and one fine-tuned with the penalty. The full graph closes every curve,
    so no point is spent where TV is near 0. How far readings are off, on other text:
    ``recipes/benchmarks/results/tracing.json``.
    """
    return _GRID


@dataclass(frozen=True)
class DensityCurve:
    """Distortion over trace size for every position of a batch.

    Attributes:
        thresholds: ``[K]``, falling.
        size: ``[K, B, T]`` share of |E| of the trace at each threshold; NaN at padding.
        total_variation: ``[K, B, T]`` in [0, 1]; NaN at padding.
        edges: ``[B, T]`` int64, |E| of each position; 0 at padding.
        entropy: ``[B, T]`` nats, of the full model's prediction.
        composition: ``[K + 1, B, T, Q, 4]`` number of edges by depth quartile and kind
            (``EDGE_KINDS``), the full graph last; None unless asked for.
        nucleus: ``[K + 1, B, T, P]`` bool, ordered top-p list recovered, the full graph (always
            True) last; None unless asked for.
        readings: ``[K + 1, B, T, X]`` what a caller's function read of the masked predictions, of
            the full one last; None unless asked for.
    """

    thresholds: Tensor
    size: Tensor
    total_variation: Tensor
    edges: Tensor
    entropy: Tensor
    composition: Tensor | None = None
    nucleus: Tensor | None = None
    readings: Tensor | None = None

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
            InvalidInputError: bound outside (0, 1).
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


def density_curve(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    thresholds: Sequence[float] | Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    composition: bool = False,
    nucleus: bool = False,
) -> DensityCurve:
    """Distortion over size for every position, one masked run a threshold (identities 3 and 4).

    Args:
        model: a causal language model; attached on the fly.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
        thresholds: importances in (0, 1); None for :func:`default_thresholds`.
        position_ids: ``[B, T]`` of packed rows, see :func:`softtrace.edge_importance`; each
            position's |E| is then that of its own document.
        composition: also count edges by depth quartile and kind.
        nucleus: also compare ordered top-p lists (sorts the vocabulary once a run: slow).

    Raises:
        UnsupportedModelError, InvalidInputError, NonFiniteError: see
            :func:`softtrace.edge_importance`; thresholds outside (0, 1) or none at all.
    """
    instrument = attach(model)
    grid = default_thresholds() if thresholds is None else _numbers(thresholds)
    for tau in grid:
        check_range("threshold", tau, 0.0, 1.0, open_low=True, open_high=True)
    with torch.no_grad():
        recording = instrument.record(instrument.batch(input_ids, attention_mask, position_ids))
        return curve_of(
            instrument,
            recording,
            recording.importance,
            grid,
            composition=composition,
            nucleus=nucleus,
        )


def _numbers(thresholds: Sequence[float] | Tensor) -> list[float]:
    try:
        return [float(tau) for tau in thresholds]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"thresholds: found {thresholds!r}, expected a sequence or [K] tensor of numbers"
        ) from error


@torch.no_grad()
def curve_of(
    instrument: Instrument,
    recording: Recording,
    scores: EdgeImportance,
    thresholds: Sequence[float],
    *,
    composition: bool = False,
    nucleus: bool = False,
    reader: Callable[[Tensor], Tensor] | None = None,
    explained: Tensor | None = None,
) -> DensityCurve:
    """Sweep thresholds over any score of the edges; the importances give the s-Traces.

    Args:
        instrument: of the model.
        recording: of a batch.
        scores: what the search goes by (importances, or a baseline's scores).
        thresholds: edges of score >= threshold are kept.
        composition, nucleus: see :func:`density_curve`.
        reader: takes logits ``[n, V]`` of some positions and returns ``[n, X]``: what else is read
            of every masked prediction, so that logits of all thresholds need not be kept.
        explained: ``[B, T]`` bool, at least one of them True: where nucleus recovery and ``reader``
            are wanted, which sort the vocabulary; they are 0 elsewhere. None for everywhere.
    """
    if not len(thresholds):
        raise InvalidInputError("thresholds: found none, at least one is needed")
    valid = scores.valid
    grid = torch.tensor(sorted(thresholds, reverse=True), dtype=torch.float64, device=valid.device)
    total = total_edges(scores)
    full = recording.logits.to(working_dtype(recording.logits.dtype)).softmax(-1)
    padding = ~valid
    explained = torch.ones_like(valid) if explained is None else explained
    sizes, variations, compositions, nuclei, readings = [], [], [], [], []
    for tau in grid.tolist():
        masks = hard_masks(scores, tau)
        counts = edge_counts(masks)
        read = instrument.masked_hidden(recording.batch, masks, recording.attention)
        share = counts.double().sum((2, 3)) / total.clamp_min(1)
        sizes.append(share.masked_fill(padding, torch.nan))
        variation, recovered, others = _distortion(
            instrument, read, full, recording.logits, explained, nucleus, reader
        )
        variations.append(variation.masked_fill(padding, torch.nan))
        nuclei += recovered
        readings += others
        if composition:
            compositions.append(_by_quartile(counts))
    if composition:
        compositions.append(_by_quartile(edge_counts(scores.existing())))
    if nucleus:
        nuclei.append(torch.ones_like(nuclei[-1]))
    if reader is not None:
        parts = torch.split(recording.logits[explained], _portion(full))
        readings.append(_placed([reader(part) for part in parts], explained))
    return DensityCurve(
        thresholds=grid,
        size=torch.stack(sizes),
        total_variation=torch.stack(variations),
        edges=total,
        entropy=entropy(recording.logits).masked_fill(padding, torch.nan),
        composition=torch.stack(compositions) if composition else None,
        nucleus=torch.stack(nuclei) if nucleus else None,
        readings=torch.stack(readings) if reader is not None else None,
    )


def _distortion(
    instrument: Instrument,
    read: Tensor,
    full: Tensor,
    logits: Tensor,
    explained: Tensor,
    nucleus: bool,
    reader: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """TV ``[B, T]``, nucleus recovery ``[B, T, P]`` or nothing, what ``reader`` reads or nothing.

    In portions of positions.

    Args:
        instrument: of the model.
        read: ``[B, T, d_model]``, what the final norm gives in a masked run.
        full, logits: ``[B, T, V]``, the full model's probabilities and logits.
        nucleus: whether nucleus recovery is wanted.
        explained, reader: see :func:`curve_of`.
    """
    shape, rows = full.shape[:-1], _portion(full)
    variations, recovered, others = [], [], []
    for part, p, own, chosen in zip(
        *(torch.split(every.flatten(0, 1), rows) for every in (read, full, logits, explained)),
        strict=True,
    ):
        masked = instrument.anatomy.readout.logits(part)
        variations.append(variation_from(p, masked))
        if nucleus and bool(chosen.any()):
            recovered.append(nucleus_recovered(own[chosen], masked[chosen], NUCLEUS_SHARES))
        if reader is not None and bool(chosen.any()):
            others.append(reader(masked[chosen]))
    variation = torch.cat(variations).reshape(shape)
    nuclei, readings = (
        [_placed(parts, explained)] if parts else [] for parts in (recovered, others)
    )
    return variation, nuclei, readings


def _placed(parts: list[Tensor], explained: Tensor) -> Tensor:
    """Rows of the explained positions ``[n, X]`` at their places, ``[B, T, X]``; 0 elsewhere."""
    rows = torch.cat(parts)
    placed = rows.new_zeros(*explained.shape, rows.shape[-1])
    placed[explained] = rows
    return placed


def _portion(logits: Tensor) -> int:
    """How many positions' logits are looked at together."""
    return max(1, (_CACHED if logits.device.type == "cpu" else _PORTION) // logits.shape[-1])


def _by_quartile(counts: Tensor) -> Tensor:
    """``[B, T, L, 4]`` to ``[B, T, Q, 4]``: layer l belongs to quartile ⌊4·l / L⌋."""
    layers = counts.shape[2]
    quartile = torch.arange(layers, device=counts.device) * DEPTH_QUARTILES // layers
    summed = counts.new_zeros(*counts.shape[:2], DEPTH_QUARTILES, counts.shape[3])
    return summed.index_add_(2, quartile, counts)
