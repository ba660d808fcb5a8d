"""Everything ``softtrace evaluate`` measures on a set of blocks, and its summary in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from softtrace.checks import check_least, check_range
from softtrace.density.baselines import (
    Baseline,
    baseline_scores,
    baseline_thresholds,
)
from softtrace.density.curve import DensityCurve, default_thresholds
from softtrace.density.easiness import loss_score
from softtrace.density.exits import exit_agreement
from softtrace.density.halving import Halving, Portion
from softtrace.density.sweep import curve_of
from softtrace.graph.batch import Batch
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind
from softtrace.tracing.recording import Recording

ADVICE = "shorter blocks (--block_size), a smaller --dtype, or --device_map auto"
"""What takes less memory where one position does not fit, to one who uses the command line."""

Progress = Callable[[int], Any]

LISTS = ("entropy", "loss", "area", "size", "variation", "agreement", "nucleus")
"""Fields of :class:`Measurements` that are lists of tensors, one for each batch."""


@dataclass
class Measurements:
    """Per explained position, batches one after another; ``n`` positions.

    Attributes:
        entropy, loss: ``[n]`` nats.
        area, size: ``[n]``; size is that at TV 0.2.
        variation: ``[26, n]`` TV at :data:`SIZES`.
        agreement: ``[L, n]`` bool, early exits.
        composition: ``[26, 4, 4]`` float64, edges of all traces by depth quartile and kind, summed.
        nucleus: ``[26, m, 8]`` recovered shares, on the first blocks.
        baselines: name to ``[26, m]`` TV, on the first blocks.
        batch_size: sequences a forward in the end: less than asked for where memory ran out.
    """

    entropy: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    area: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)
    variation: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    composition: Tensor | None = None
    nucleus: list[Tensor] = field(default_factory=list)
    baselines: dict[tuple[Baseline, bool], list[Tensor]] = field(default_factory=dict)
    batch_size: int = 0

    def extend(self, other: Measurements) -> None:
        """Put the measurements of later positions behind these; nothing is copied."""
        for name in LISTS:
            getattr(self, name).extend(getattr(other, name))
        for key, parts in other.baselines.items():
            self.baselines.setdefault(key, []).extend(parts)
        if self.composition is None or other.composition is None:
            self.composition = other.composition if self.composition is None else self.composition
        else:
            self.composition = self.composition + other.composition


def masked_runs(extra: bool) -> int:
    """How many masked runs a block takes, one with baselines too: they are what takes time."""
    of_baselines = 2 * len(get_args(Baseline)) * len(baseline_thresholds())
    return len(default_thresholds()) + extra * of_baselines


def first_explained(block_size: int, positions: int | None) -> int:
    """The first position of a block that is explained; the last one's target is not known.

    Args:
        block_size: tokens of a block, at least 4.
        positions: how many are explained, the last ones; None for the second half.

    Raises:
        InvalidInputError: none of them, or more than have a target.
    """
    if positions is None:
        return block_size // 2
    check_least("positions", positions, 1)
    check_range("positions", positions, 1, block_size - 1)
    return block_size - 1 - positions


@torch.no_grad()
def measure(
    model: nn.Module,
    blocks: Tensor,
    *,
    min_context: int,
    batch_size: int,
    extra_blocks: int,
    progress: Progress,
    attention: AttentionKind = "recomputed",
    attention_mask: Tensor | None = None,
    first: int = 0,
) -> Measurements:
    """Measure blocks of one length.

    Where memory runs out, what does not fit is halved and measured again, and later batches stay at
    that size (:class:`softtrace.density.halving.Halving`). Batches, padding and this change numbers
    by rounding only: what is random is drawn for every block by its own number.

    Where weights are sharded (FSDP) all processes call this, each with blocks of its own, as many
    as it has (also none), and each gets the measurements of its own; give ``first``, and what
    of ``extra_blocks`` is among them, as where a single process measures a part of all. What does
    not fit in the middle of a run cannot be halved there, and is refused.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids.
        min_context: real tokens before this one are context only: the number of edges grows with
            the length, so sizes are compared between positions of similar length.
        batch_size: sequences a forward, to begin with.
        extra_blocks: how many of the first blocks also get baselines and nucleus recovery.
        progress: called with the number of masked runs of a block that were finished since, see
            :func:`masked_runs`; a negative one where memory ran out and they are made again.
        attention: where masked runs take their attention probabilities from, see
            :func:`softtrace.density_curve`.
        attention_mask: ``[N, T]`` of 0 and 1, padding on either side; None for no padding.
        first: number of the first block, where these blocks are a part of more.

    Raises:
        InvalidInputError: not even one position of one block fits into memory; or a batch that
            :meth:`softtrace.graph.batch.Batch.of` refuses.
        SofttraceError: where weights are sharded, another process failed.
    """
    instrument = attach(model)
    device = device_of_module(model)
    halving = Halving(batch_size, blocks.shape[1], ADVICE)
    found, runs = Measurements(), RunsShown(progress)
    with instrument.in_turns():
        with_extra = min(extra_blocks, len(blocks))
        for low, high in ((0, with_extra), (with_extra, len(blocks))):  # never in one batch
            if low == high:
                continue
            mask = None if attention_mask is None else attention_mask[low:high].to(device)
            batch = instrument.batch(blocks[low:high].to(device), mask)
            extra, number = low < extra_blocks, first + low
            work = partial(_measured, instrument, attention, extra, number, runs)
            for count, parts in halving.each(batch, _explained(batch, min_context), work):
                for _, part in parts:
                    found.extend(part)
                runs.settle(count * masked_runs(extra))
    found.batch_size = max(1, halving.sequences.size)
    return found


class RunsShown:
    """Shows masked runs as they end; those of work that is done again are shown once.

    Args:
        progress: see :func:`measure`.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._shown, self._done = 0, 0.0

    def begin(self, portion: Portion, runs: int) -> Callable[[], None]:
        """Work on a portion begins; returns what shows that one masked run of it ended.

        Args:
            portion: of so many blocks, or of the positions of one.
            runs: of a block, in all.
        """
        blocks = len(portion.batch.valid)
        self._done = portion.before * runs * blocks

        def ran() -> None:
            self._done += portion.share * blocks
            whole = int(self._done + 1e-6)  # shares are no binary fractions
            if whole > self._shown:
                self._progress(whole - self._shown)
                self._shown = whole

        return ran

    def settle(self, runs: int) -> None:
        """The work has ended, which were so many runs."""
        self._progress(runs - self._shown)
        self._shown = 0


def _measured(
    instrument: Instrument,
    attention: AttentionKind,
    extra: bool,
    number: int,
    runs: RunsShown,
    portion: Portion,
) -> Measurements:
    """Everything that is measured of a portion; ``number`` is that of the first portion's block."""
    batch, explained = portion.batch, portion.chosen
    assert explained is not None
    ran = runs.begin(portion, masked_runs(extra))
    recording = instrument.record(
        batch, keep_hidden=True, keep_attention=attention == "recorded", positions=explained
    )
    curve = trace_curve(
        instrument, recording, attention=attention, nucleus=extra, positions=explained, ran=ran
    )
    edges = curve.at_sizes(values=_there(curve.composition)).double()
    found = Measurements(
        entropy=[_flat(curve.entropy, explained)],
        loss=[loss_score(recording.logits, batch.targets[explained]).cpu()],
        area=[_flat(curve.area(), explained)],
        size=[_flat(curve.size_at(), explained)],
        variation=[_flat(curve.at_sizes(), explained)],
        agreement=[_flat(exit_agreement(instrument, recording), explained)],
        composition=edges[:, explained].sum(1).cpu(),
    )
    if extra:
        nucleus = curve.at_sizes(values=_there(curve.nucleus))
        found.nucleus.append(nucleus[:, explained].cpu())
        seeds = range(number + portion.first, number + portion.first + len(batch.valid))
        for kind in get_args(Baseline):
            for keep in (True, False):
                scores = baseline_scores(recording.importance, kind, keep_residual=keep, seed=seeds)
                other = curve_of(
                    instrument,
                    recording,
                    scores,
                    baseline_thresholds(),
                    attention=attention,
                    positions=explained,
                    ran=ran,
                )
                found.baselines[kind, keep] = [_flat(other.at_sizes(), explained)]
    return found


def trace_curve(
    instrument: Instrument,
    recording: Recording,
    *,
    attention: AttentionKind,
    nucleus: bool,
    reader: Callable[[Tensor], Tensor] | None = None,
    positions: Tensor,
    ran: Callable[[], object] | None = None,
) -> DensityCurve:
    """The curve of the s-Traces of a batch, at the default thresholds, with their composition.

    Args:
        instrument: of the model.
        recording: of the batch.
        attention, nucleus, reader, positions, ran: see
            :func:`softtrace.density.sweep.curve_of`.
    """
    return curve_of(
        instrument,
        recording,
        recording.importance,
        default_thresholds(),
        attention=attention,
        composition=True,
        nucleus=nucleus,
        reader=reader,
        positions=positions,
        ran=ran,
    )


def _explained(batch: Batch, min_context: int) -> Tensor:
    """``[B, T]`` bool: positions with context before and a token after them."""
    valid = batch.valid
    return valid & (valid.cumsum(-1) > min_context) & (batch.targets >= 0)


def _flat(values: Tensor, explained: Tensor) -> Tensor:
    """``[..., B, T]`` at ``[B, T]`` bool to ``[..., n]`` on the CPU."""
    return values[..., explained].cpu()


def _there(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("the curve was made without it")
    return values
