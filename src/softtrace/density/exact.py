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
from softtrace.model.memory import Portions
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind, with_attention_kept
from softtrace.tracing.means import LayerMeans
from softtrace.tracing.recording import Recording

MOST_RUNS = 50_000
"""Sequences that are run without a word; more would take hours on most machines."""


class OwnRuns:
    """Masked runs of single positions, several at a time, and fewer where memory runs out.

    Args:
        instrument: of the model.
        recording: of the batch.
        attention: ``"recomputed"`` or ``"kept"``.
        positions: ``[B, T]`` bool, those that are run.
        means: that stand in for absent edges; None for nothing.
    """

    def __init__(
        self,
        instrument: Instrument,
        recording: Recording,
        attention: AttentionKind,
        positions: Tensor,
        means: Sequence[LayerMeans] | None = None,
    ) -> None:
        self.instrument, self.recording, self.attention = instrument, recording, attention
        self.positions, self.means = positions, means
        at_once = rows_at_once(recording.importance.layers)
        self._portions = Portions(at_once, "run(s) of single positions")

    def hidden(self, masks: Sequence[LayerEdges]) -> Tensor:
        """What the final norm gives at each position when only its own trace is kept.

        Args:
            masks: bool, of all positions at one threshold.

        Returns:
            ``[B, T, d_model]``; 0 at other positions.
        """
        rows, places = self.positions.nonzero().T

        def run(first: int, end: int) -> Tensor:
            return self._run(masks, rows[first:end], places[first:end])

        hidden = torch.cat([read for _, read in self._portions.each(0, len(rows), run)])
        placed = hidden.new_zeros(*self.positions.shape, hidden.shape[-1])
        placed[self.positions] = hidden
        return placed

    def _run(self, masks: Sequence[LayerEdges], rows: Tensor, places: Tensor) -> Tensor:
        """``[N, d_model]`` of N places of some rows."""
        select = partial(torch.index_select, dim=0, index=rows)
        traces = traces_of(masks, rows, places)
        if self.attention == "kept":
            visible = [select(seen) for seen in self.recording.importance.visible]
            traces = with_attention_kept(traces, visible)
        batch = self.recording.batch.part(select)
        read = self.instrument.masked_hidden(batch, traces, means=self.means)
        return read[torch.arange(len(read), device=read.device), places]


def check_runs(runs: OwnRuns, thresholds: int) -> None:
    """Refuse more than :data:`MOST_RUNS` runs, and say how long they would take.

    Args:
        runs: of the positions.
        thresholds: runs of each position.

    Raises:
        InvalidInputError: too many.
    """
    positions = runs.positions
    count = int(positions.sum())
    if count * thresholds <= MOST_RUNS:
        return
    masks = hard_masks(runs.recording.importance, 0.01)
    chosen = positions & (positions.flatten().cumsum(0).reshape(positions.shape) <= 8)
    few = OwnRuns(runs.instrument, runs.recording, "recomputed", chosen)
    few.hidden(masks)
    begin = time.perf_counter()
    few.hidden(masks)
    hours = (time.perf_counter() - begin) / min(8, count) * count * thresholds / 3600
    raise InvalidInputError(
        f"exact: found {count:,} positions at {thresholds} thresholds, allowed are {MOST_RUNS:,} "
        f"runs in all; these would take about {hours:.1f} hours here. Choose fewer positions "
        "(positions=...), fewer sequences at a time, or exact=False"
    )
