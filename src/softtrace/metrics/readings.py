"""What all metrics read of a batch, from one recording and one sweep of masked runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.checks import check_least
from softtrace.density.curve import DensityCurve, default_thresholds
from softtrace.density.exits import exit_agreement
from softtrace.density.halving import Halving, Portion
from softtrace.density.sweep import curve_of
from softtrace.errors import InvalidInputError
from softtrace.tracing.attach import attach
from softtrace.tracing.masking import AttentionKind, check_attention

_ADVICE = "shorter sequences or a smaller dtype of the weights"


@torch.no_grad()
def readings(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    min_context: int = 0,
    attention: AttentionKind = "recorded",
    thresholds: Sequence[float] | None = None,
    composition: bool = True,
    nucleus: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for ``update`` of a ``MetricCollection``, which hands each metric its own.

    A metric by itself takes those that it names: ``density.update(found["curve"])``.

    Where memory runs out less is done at a time, as in :func:`softtrace.density_curve`.

    Where weights are sharded (FSDP) all processes call this equally often, each with a batch of its
    own: metrics then reduce over processes as torchmetrics does.

    Args:
        model: A causal language model; attached on the fly.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` of 0 and 1, padding on either side; None for no padding.
        position_ids: ``[B, T]`` of packed rows, see :func:`softtrace.edge_importance`.
        min_context: Real tokens of its document that have to stand before a position that counts:
            the number of edges grows with the length, so sizes compare at similar length only.
        attention, thresholds: See :func:`softtrace.density_curve`.
        composition: Count edges by depth and kind, for ``TraceComposition``.
        nucleus: Compare top-p lists, for ``NucleusRecovery`` (slow).

    Returns:
        ``curve`` (a ``softtrace.DensityCurve``), ``exits`` ``[L, B, T]`` bool and ``positions``
        ``[B, T]`` bool.

    Raises:
        UnsupportedModelError, InvalidInputError, NonFiniteError: See
            :func:`softtrace.density_curve`.
    """
    check_least("min_context", min_context, 0)
    check_attention(attention)
    instrument = attach(model)
    with instrument.in_turns():
        batch = instrument.batch(input_ids, attention_mask, position_ids)
        valid = batch.valid
        before = valid.cumsum(-1) - 1 if batch.positions is None else batch.positions

        def work(portion: Portion) -> tuple[DensityCurve, Tensor]:
            recording = instrument.record(
                portion.batch,
                keep_hidden=True,
                keep_attention=attention == "recorded",
                positions=portion.chosen,
            )
            curve = curve_of(
                instrument,
                recording,
                recording.importance,
                default_thresholds() if thresholds is None else thresholds,
                attention=attention,
                positions=portion.chosen,
                composition=composition,
                nucleus=nucleus,
            )
            return curve, exit_agreement(instrument, recording)

        rows, length = valid.shape
        curves, agreed = [], []
        for _, parts in Halving(rows, length, _ADVICE).each(batch, None, work):
            (_, (curve, exits)), *others = parts
            for places, (other, more) in others:
                assert places is not None
                curve, exits = curve.filled(other, places), exits & more  # True elsewhere
            curves.append(curve)
            agreed.append(exits)
        return {
            "curve": curves[0].beside(curves[1:]),
            "exits": torch.cat(agreed, 1),
            "positions": valid & (before >= min_context),
        }


def counted(curve: DensityCurve, positions: Tensor | None) -> Tensor:
    """``[B, T]`` bool: which positions of a batch a metric takes.

    Raises:
        InvalidInputError: positions of another shape, or padding among them.
    """
    real = curve.edges > 0
    if positions is None:
        return real
    if positions.shape != real.shape or positions.dtype != torch.bool:
        raise InvalidInputError(
            f"positions: found {positions.dtype} of shape {tuple(positions.shape)}, allowed is "
            f"bool of the curve's {tuple(real.shape)}"
        )
    if bool((positions & ~real).any()):
        raise InvalidInputError("positions: found padding among them; leave it out")
    return positions
