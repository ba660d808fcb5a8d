"""Masked runs of single positions, exact where one run for all positions is an approximation.

With recomputed attention a prediction also depends, through the softmax's denominators and keys, on
nodes outside of its own trace. So each position is run as a sequence of its own, in which nothing
but its trace is kept; several of them are one batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from softtrace.errors import InvalidInputError
from softtrace.graph.edges import LayerEdges
from softtrace.graph.masks import hard_masks
from softtrace.graph.reach import rows_at_once, traces_of
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind, with_attention_kept
from softtrace.tracing.means import LayerMeans
from softtrace.tracing.recording import Recording

MOST_RUNS = 50_000
"""Sequences that are run without a word; more would take hours on most machines."""

_MASK_ELEMENTS = 1 << 28  # of the masks of one batch, a byte each


def check_runs(
    instrument: Instrument, recording: Recording, positions: Tensor, thresholds: int
) -> None:
    """Refuse more than :data:`MOST_RUNS` runs, and say how long they would take.

    Args:
        instrument: of the model.
        recording: of the batch.
        positions: ``[B, T]`` bool.
        thresholds: runs of each position.

    Raises:
        InvalidInputError: too many.
    """
    count = int(positions.sum())
    if count * thresholds <= MOST_RUNS:
        return
    masks = hard_masks(recording.importance, 0.01)
    chosen = positions & (positions.flatten().cumsum(0).reshape(positions.shape) <= 8)
    exact_hidden(instrument, recording, masks, "recomputed", chosen)
    begin = time.perf_counter()
    exact_hidden(instrument, recording, masks, "recomputed", chosen)
    hours = (time.perf_counter() - begin) / 8 * count * thresholds / 3600
    raise InvalidInputError(
        f"exact: found {count:,} positions at {thresholds} thresholds, allowed are {MOST_RUNS:,} "
        f"runs in all; these would take about {hours:.1f} hours here. Choose fewer positions "
        "(positions=...), fewer sequences at a time, or exact=False"
    )


def exact_hidden(
    instrument: Instrument,
    recording: Recording,
    masks: tuple[LayerEdges, ...],
    attention: AttentionKind,
    positions: Tensor,
    means: Sequence[LayerMeans] | None = None,
) -> Tensor:
    """What the final norm gives at each position when only its own trace is kept.

    Args:
        instrument: of the model.
        recording: of the batch.
        masks: bool, of all positions at one threshold.
        attention: ``"recomputed"`` or ``"kept"``.
        positions: ``[B, T]`` bool, at least one.
        means: that stand in for absent edges; None for nothing.

    Returns:
        ``[B, T, d_model]``; 0 at other positions.
    """
    found: list[Tensor] = []
    rows, places = positions.nonzero().T
    for own_rows, own_places in zip(
        *(torch.split(each, rows_at_once(masks, _MASK_ELEMENTS)) for each in (rows, places)),
        strict=True,
    ):
        batch = recording.batch.part(partial(torch.index_select, dim=0, index=own_rows))
        traces = traces_of(masks, own_rows, own_places)
        if attention == "kept":
            visible = [seen[own_rows] for seen in recording.importance.visible]
            traces = with_attention_kept(traces, visible)
        read = instrument.masked_hidden(batch, traces, means=means)
        found.append(read[torch.arange(len(read), device=read.device), own_places])
    hidden = torch.cat(found)
    placed = hidden.new_zeros(*positions.shape, hidden.shape[-1])
    placed[positions] = hidden
    return placed
