"""Identity 3: one masked run serves every position, so a grid of runs gives every density curve.

All edges of importance >= τ are kept everywhere; the output at position t then depends only on the
kept edges that reach t, and those are t's own s-Trace at threshold τ. That is exact where masked
runs use the attention probabilities of the full run. Where they compute their own, those depend on
nodes outside of the trace too, and one run for all positions is an approximation; exact is a run of
its own for every position and threshold (:mod:`softtrace.density.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from softtrace.checks import check_range
from softtrace.density.chunks import rows_at_once
from softtrace.density.curve import (
    DensityCurve,
    by_quartile,
    default_thresholds,
    fine_thresholds,
)
from softtrace.density.distortion import entropy, nucleus_recovered, variation_from
from softtrace.density.exact import OwnRuns, check_runs
from softtrace.density.halving import Portion, curve_in_portions
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import chunk_elements
from softtrace.graph.edges import EdgeImportance, LayerEdges, RowwiseEdges
from softtrace.graph.importance import working_dtype
from softtrace.graph.masks import hard_masks
from softtrace.graph.rowwise_sizes import traces_at, traces_at_each
from softtrace.graph.sizes import edge_counts, held_traces_at, total_edges
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind, check_attention, with_attention_kept
from softtrace.tracing.means import LayerMeans
from softtrace.tracing.recording import Recording

_CACHED = 1 << 19  # logits that a processor's cache holds while they are compared
_ROWS = 64  # positions for which reading a head's weights once pays, as its product takes longer


def density_curve(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    thresholds: Sequence[float] | Tensor | Literal["fine"] | None = None,
    *,
    attention: AttentionKind = "recorded",
    exact: bool = False,
    positions: Tensor | Iterable[int] | None = None,
    position_ids: Tensor | None = None,
    composition: bool = False,
    nucleus: bool = False,
) -> DensityCurve:
    """Distortion over size for every position, with one masked run a threshold.

    Where memory runs out the batch is halved, then attention maps are made row by row, then
    positions are halved. Where weights are sharded (FSDP) all processes call this, each with a
    batch of its own, or all with the same, and each gets the curve of its own batch; what does not
    fit in the middle of a run cannot be halved there, and is refused.

    Args:
        model: A causal language model; attached on the fly.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
        thresholds: Importances in (0, 1); None for the 11 of :func:`default_thresholds`, ``"fine"``
            for the 90 of :func:`fine_thresholds`, where TV at single sizes matters.
        attention: Where masked runs take their attention probabilities from:
            ``"recorded"`` in the full run, ``"recomputed"`` from the masked states, or ``"kept"``,
            recomputed with no attention edge masked (:mod:`softtrace.tracing.masking`).
        exact: Run every position with its own trace alone, one sequence a position and threshold.
            Recorded attention is exact in any case.
        positions: Which positions are measured, ``[B, T]`` bool, or integers, the same of every
            sequence, negative ones counted from its last real token; the others are NaN, their
            ``edges`` 0. It costs about one masked run a threshold of what they need: tokens after
            the last one do not run, and neither does, with recorded attention, what reaches none of
            them. None for all.
        position_ids: ``[B, T]`` of packed rows, see :func:`softtrace.edge_importance`; each
            position's |E| is then that of its own document.
        composition: Also count edges by depth quartile and kind.
        nucleus: Also compare ordered top-p lists (sorts the vocabulary once a run: slow).

    Raises:
        UnsupportedModelError, InvalidInputError, NonFiniteError: See
            :func:`softtrace.edge_importance`; an unknown kind of attention; thresholds outside
            (0, 1) or none at all; positions of another shape, or so many exact runs that they would
            take hours; a sequence of which not even one position fits into memory.
        SofttraceError: Where weights are sharded, another process failed.
    """
    check_attention(attention)
    instrument = attach(model)
    grid = _numbers(default_thresholds() if thresholds is None else thresholds)
    for tau in grid:
        check_range("threshold", tau, 0.0, 1.0, open_low=True, open_high=True)
    with torch.no_grad(), instrument.in_turns():
        batch = instrument.batch(input_ids, attention_mask, position_ids)
        chosen, length = None, batch.valid.shape[1]
        if positions is not None:
            batch, chosen = batch.up_to(positions)

        def work(part: Portion) -> DensityCurve:
            keep = attention == "recorded"
            recording = instrument.record(part.batch, keep_attention=keep, positions=part.chosen)
            return curve_of(
                instrument,
                recording,
                recording.importance,
                grid,
                attention=attention,
                exact=exact,
                positions=part.chosen,
                composition=composition,
                nucleus=nucleus,
            )

        return curve_in_portions(batch, chosen, work).padded(length)


def _numbers(thresholds: Iterable[float] | str) -> list[float]:
    try:
        if isinstance(thresholds, str) and thresholds == "fine":
            return list(fine_thresholds())
        return [float(tau) for tau in thresholds]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"thresholds: found {thresholds!r}, expected a sequence or [K] tensor of numbers, or "
            "'fine'"
        ) from error


@torch.no_grad()
def curve_of(
    instrument: Instrument,
    recording: Recording,
    scores: EdgeImportance,
    thresholds: Sequence[float],
    *,
    attention: AttentionKind = "recorded",
    exact: bool = False,
    means: Sequence[LayerMeans] | None = None,
    positions: Tensor | None = None,
    composition: bool = False,
    nucleus: bool = False,
    reader: Callable[[Tensor], Tensor] | None = None,
    ran: Callable[[], object] | None = None,
) -> DensityCurve:
    """Sweep thresholds over any score of the edges; the importances give the s-Traces.

    Args:
        instrument: of the model.
        recording: of a batch, with its attention probabilities where they are used, and logits of
            all positions that are measured.
        scores: what the search goes by (importances, or a baseline's scores).
        thresholds: edges of score >= threshold are kept.
        attention, exact, positions, composition, nucleus: see :func:`density_curve`.
        means: of :meth:`softtrace.Instrument.means_of`, which stand in for absent edges; None for
            nothing, as in the paper.
        reader: takes logits ``[n, V]`` of some positions and returns ``[n, X]``: what else is read
            of every masked prediction, so that logits of all thresholds need not be kept.
        ran: called after each threshold, of which there is one masked run.
    """
    if not len(thresholds):
        raise InvalidInputError("thresholds: found none; give at least one")
    measured = scores.valid if positions is None else positions
    grid = torch.tensor(
        sorted(thresholds, reverse=True), dtype=torch.float64, device=measured.device
    )
    places = None if positions is None else _places(measured)
    total = _at_places(total_edges(scores, places), places, measured)
    full, own_entropy = _predicted(recording, measured)
    others = ~measured
    own_runs = None
    exact = exact and attention != "recorded"
    if exact and bool(measured.any()):
        own_runs = OwnRuns(instrument, recording, attention, measured, means)
        check_runs(own_runs, len(grid))
    sizes, variations, compositions, nuclei, readings = [], [], [], [], []
    # What reaches no measured position may change others' softmax, unless that was recorded.
    narrowed = attention == "recorded" and not means
    for counts, masks in _counted(scores, grid.tolist(), places, measured, narrowed):
        if own_runs is None:
            read = read_masked(instrument, recording, masks, attention, means)
        else:
            read = own_runs.hidden(masks)
        share = counts.double().sum((2, 3)) / total.clamp_min(1)
        sizes.append(share.masked_fill(others, torch.nan))
        variation, recovered, more = _distortion(
            instrument, recording, measured, read[measured], full, nucleus, reader
        )
        variations.append(_placed([variation[:, None]], measured, torch.nan)[..., 0])
        if recovered:
            nuclei.append(_placed(recovered, measured))
        if more:
            readings.append(_placed(more, measured))
        if composition:
            compositions.append(by_quartile(counts))
        if ran is not None:
            ran()
    if composition:
        counts = edge_counts(scores.existing(), places)
        compositions.append(by_quartile(_at_places(counts, places, measured)))
    if nucleus:
        nuclei.append(torch.ones_like(nuclei[-1]))
    if reader is not None:
        parts = torch.split(measured.flatten().nonzero()[:, 0], _portion(full))
        readings.append(_placed([reader(recording.logits_of(part)) for part in parts], measured))
    return DensityCurve(
        thresholds=grid,
        size=torch.stack(sizes),
        total_variation=torch.stack(variations),
        edges=total,
        entropy=_placed([own_entropy[:, None]], measured, torch.nan)[..., 0],
        composition=torch.stack(compositions) if composition else None,
        nucleus=torch.stack(nuclei) if nucleus else None,
        readings=torch.stack(readings) if reader is not None else None,
        attention=attention,
        exact=exact or attention == "recorded",
    )


def _predicted(recording: Recording, measured: Tensor) -> tuple[Tensor, Tensor]:
    """The full model's probabilities ``[n, V]`` at n measured positions, and entropies ``[n]``.

    In portions: an entropy takes three copies of its logits.
    """
    places = measured.flatten().nonzero()[:, 0]
    logits = recording.logits
    full = logits.new_empty(len(places), logits.shape[-1], dtype=working_dtype(logits.dtype))
    entropies = full.new_empty(len(places))
    elements = _CACHED if logits.device.type == "cpu" else chunk_elements(logits.device)
    rows = max(1, elements // logits.shape[-1])
    for start in range(0, len(places), rows):
        part = slice(start, start + rows)
        own = recording.logits_of(places[part])
        full[part] = own.to(full.dtype).softmax(-1)
        entropies[part] = entropy(own)
    return full, entropies


def _places(measured: Tensor) -> Tensor:
    """``[B, n]``, the positions of each sequence, those with fewer filled up with others."""
    count = max(1, int(measured.sum(1).max()))
    return measured.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def _at_places(values: Tensor, places: Tensor | None, measured: Tensor) -> Tensor:
    """``[B, n, ...]`` of places at ``[B, T, ...]``, 0 where nothing is measured."""
    there = measured.reshape(*measured.shape, *(1 for _ in values.shape[2:]))
    if places is None:
        return values * there
    found = values.new_zeros(*measured.shape, *values.shape[2:])
    rows = torch.arange(len(places), device=places.device)[:, None]
    found[rows, places] = values
    return found * there


def _counted(
    scores: EdgeImportance,
    grid: Sequence[float],
    places: Tensor | None,
    measured: Tensor,
    narrowed: bool,
) -> Iterator[tuple[Tensor, tuple[LayerEdges, ...]]]:
    """At each threshold ``[B, T, L, 4]`` edges of the traces, and masks.

    Args:
        scores, grid, measured: see :func:`curve_of`.
        places: ``[B, n]``, the measured positions, see :func:`_places`; None for all.
        narrowed: whether the masks shall have nothing but what the places need.
    """
    if isinstance(scores.layers[0], RowwiseEdges):
        masks = [hard_masks(scores, tau) for tau in grid]
        for own, (counts, needed) in zip(
            masks, traces_at_each(scores.layers, masks, places), strict=True
        ):
            yield _at_places(counts, places, measured), needed if narrowed else own
        return
    # A GPU would wait in every layer to know which rows of attention are needed.
    narrow = traces_at if measured.device.type == "cpu" else held_traces_at
    for tau in grid:
        own = hard_masks(scores, tau)
        if places is None or not narrowed:
            yield _at_places(edge_counts(own, places), places, measured), own
        else:
            counts, needed = narrow(own, places)
            yield _at_places(counts, places, measured), needed


def read_masked(
    instrument: Instrument,
    recording: Recording,
    masks: tuple[LayerEdges, ...],
    attention: AttentionKind,
    means: Sequence[LayerMeans] | None = None,
) -> Tensor:
    """``[B, T, d_model]``, what the final norm gives in one masked run of all positions.

    Args:
        instrument, recording, attention: see :func:`curve_of`.
        masks: bool, at the threshold.
        means: that stand in for absent edges; None for nothing.
    """
    if attention == "kept":
        masks = with_attention_kept(masks, recording.importance.visible)
    recorded = recording.attention if attention == "recorded" else None
    return instrument.masked_hidden(recording.batch, masks, recorded, means=means)


def _distortion(
    instrument: Instrument,
    recording: Recording,
    measured: Tensor,
    read: Tensor,
    full: Tensor,
    nucleus: bool,
    reader: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """TV ``[n]`` of measured positions, rows of nucleus recovery ``[n, P]`` and of what ``reader``
    reads, or nothing. In portions of positions.

    Args:
        instrument, recording: see :func:`curve_of`.
        measured: ``[B, T]`` bool, the n positions.
        read: ``[n, d_model]``, what the final norm gives there in a masked run.
        full: ``[n, V]``, the full model's probabilities there.
        nucleus: whether nucleus recovery is wanted.
        reader: see :func:`curve_of`.
    """
    rows = _portion(full)
    places = measured.flatten().nonzero()[:, 0]
    variations, recovered, others = [], [], []
    for part, p, place in zip(
        *(torch.split(every, rows) for every in (read, full, places)), strict=True
    ):
        masked = instrument.anatomy.readout.logits(part)
        variations.append(variation_from(p, masked))
        if nucleus:
            own = recording.logits_of(place)
            recovered.append(nucleus_recovered(own, masked))
        if reader is not None:
            others.append(reader(masked))
    return torch.cat(variations), recovered, others


def _placed(parts: list[Tensor], places: Tensor, elsewhere: float = 0) -> Tensor:
    """Rows of some positions ``[n, X]`` at their places ``[B, T]`` bool, as ``[B, T, X]``."""
    rows = torch.cat(parts)
    placed = rows.new_full((*places.shape, rows.shape[-1]), elsewhere)
    placed[places] = rows
    return placed


def _portion(logits: Tensor) -> int:
    """How many positions' logits are looked at together."""
    if logits.device.type == "cpu":
        return max(_ROWS, _CACHED // logits.shape[-1])
    return rows_at_once(logits.shape[-1])
