"""The masked runs of one step: a recording run of some windows, a masked one, and their distance.

The same function is run in two ways. As it is, it looks at values where that spares work: only the
tokens that are easy reach the vocabulary, only the MLPs whose edges are kept run, the run ends at
the deepest exit. With ``static`` no shape follows from a value and nothing is read from the device,
so that a GPU can capture it once and replay it (:mod:`softtrace.loss.captured`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softtrace.density.chunks import distances, rows_at_once
from softtrace.density.distortion import DISTANCES
from softtrace.density.easiness import easiness, easy_weights
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import counted_as
from softtrace.graph.batch import Batch, check_finite, require_finite
from softtrace.graph.edges import EdgeImportance, LayerEdges
from softtrace.graph.importance import working_dtype
from softtrace.graph.masks import hard_masks, soft_masks
from softtrace.graph.sizes import soft_size
from softtrace.loss.options import DensityOptions
from softtrace.loss.term import DensityTerm
from softtrace.loss.windows import Windows
from softtrace.tracing.instrument import Instrument

MASKED_LOGITS = "logits of the full model or of the masked run"
_BEYOND_QUANTILE = 0.25
"""Share of the tokens that a static run reads beyond the easy quantile: the step is smooth."""
_COPIES = {"straight": 4, "soft": 12}
"""What held maps take until the backward pass, in maps of all layers: masks, products, logs."""


class MaskedTerm(NamedTuple):
    """What masked runs gave; scalars.

    Attributes:
        term: the distortion and, with its weight, the size; with a graph.
        distortion: Σ easy·distance / Σ easy, detached.
        soft_size: easy tokens' mean size of the traces, detached.
        easy_share: Σ easy / number of tokens that were ranked, detached.
        finite: bool, whether all logits were, of a run that does not look itself; else None.
    """

    term: Tensor
    distortion: Tensor
    soft_size: Tensor
    easy_share: Tensor
    finite: Tensor | None

    def check(self) -> None:
        """Raise :class:`NonFiniteError` if a run that did not look itself met NaN or infinity."""
        if self.finite is not None:
            require_finite(self.finite, MASKED_LOGITS)

    def at(self, strength: float) -> DensityTerm:
        """The term as it is added to a loss, at this strength."""
        return DensityTerm(
            loss=strength * self.term,
            distortion=self.distortion,
            soft_size=self.soft_size,
            easy_share=self.easy_share,
            strength=strength,
        )


def masked_term(
    instrument: Instrument,
    windows: Windows,
    options: DensityOptions,
    *,
    static: bool = False,
    together: bool = False,
) -> MaskedTerm | None:
    """The distortion of the windows' easy tokens under masks, without its strength.

    Args:
        instrument: of the model.
        windows: that the step looks at.
        options: of the term.
        static: take shapes from shapes alone and read nothing from the device. Of tokens beyond the
            easy quantile only the next quarter of all is read then, the easiest first; whoever is
            left has next to no weight.
        together: run to the end whatever is found, and give every layer a gradient, for other
            processes wait for this one.

    Returns:
        None where no token has a finite easiness; a static run, or one together with others, has a
        term of 0 there.

    Raises:
        NonFiniteError: logits are not finite; the caller looks at ``finite`` of a static run, or of
            one together with others.
    """
    unchecked = static or together
    trained = torch.is_grad_enabled()
    copies = _COPIES[options.masks] if trained else 1
    with torch.set_grad_enabled(trained and options.through_importances), counted_as(copies):
        recording = instrument.record(windows.batch, static=unchecked)
    full = recording.logits.detach()
    easy, inside = _easy(full, windows.batch, options)
    traces, masks = _masks(recording.importance, windows.thresholds, options)
    weights = easy.flatten()
    if static:
        read = math.ceil(min(1.0, options.easy_quantile + _BEYOND_QUANTILE) * len(weights))
        places = weights.topk(read).indices
    else:
        places = (weights > 0).nonzero()[:, 0]
        if not len(places):
            if not together:
                return None
            places = weights.topk(1).indices
    sums = _sums(full, windows.batch.valid) if unchecked else None
    full = full.flatten(0, 1).index_select(0, places)
    importance = recording.importance
    recorded = recording.attention if options.attention == "recorded" else None
    del recording  # and with it the other logits, which are not held while the masked run runs
    total = easy.sum().clamp_min(torch.finfo(easy.dtype).tiny)
    # Here, so that nothing stands between the logits of the masked run and their backward pass:
    # what is fused would hold them meanwhile, and copies of them.
    size = _size(importance, traces, easy / total, options)
    run = windows.batch, masks, windows.depths, places, recorded
    masked = instrument.exit_logits(*run, static=unchecked)
    if not unchecked:
        check_finite(masked.detach(), "logits of the masked run")
    found = _distances(full, masked, options)
    chosen = weights.index_select(0, places)
    # A static run also reads tokens without weight, whatever they give.
    distortion = torch.where(chosen > 0, chosen * found, 0.0).sum() / total
    term = distortion + options.size_weight * size if options.size_weight else distortion
    return MaskedTerm(
        term,
        distortion.detach(),
        size.detach(),
        total / inside.sum().clamp_min(1),
        None if sums is None else _finite(sums, masked),
    )


def _sums(full: Tensor, valid: Tensor) -> Tensor:
    """``[n, window]`` sums of real tokens' logits: one is finite only if all are."""
    return torch.where(valid, full.sum(-1, dtype=torch.float32), 0.0)


def _finite(sums: Tensor, masked: Tensor) -> Tensor:
    """Whether all logits were; a sum takes no copy of them."""
    both = sums, masked.detach()
    return torch.stack([each.sum(dtype=torch.float32) for each in both]).isfinite().all()


def _easy(full: Tensor, batch: Batch, options: DensityOptions) -> tuple[Tensor, Tensor]:
    """``[n, window]`` weights of easy tokens, and bool: which tokens were ranked for them."""
    score_of, rows = easiness(options.easiness), len(full)
    if not options.fuse:  # the scores take copies of the logits
        rows = rows_at_once(full[0].numel())
    parts = zip(torch.split(full, rows), torch.split(batch.targets, rows), strict=True)
    score = torch.cat([score_of(*part) for part in parts])
    score = score.detach().to(working_dtype(full.dtype))
    inside = batch.counted & torch.isfinite(score)  # of a callable: infinite where never easy
    return easy_weights(score, inside, options.easy_quantile, options.easy_width), inside


def _distances(full: Tensor, masked: Tensor, options: DensityOptions) -> Tensor:
    """``[N]`` distances of masked predictions from the full ones, logits ``[N, V]`` both."""
    chosen = options.distance
    distance = chosen if callable(chosen) else DISTANCES[chosen]

    def of(full: Tensor, masked: Tensor) -> Tensor:
        found: Tensor = distance(full, masked)
        if found.shape != masked.shape[:1]:
            raise InvalidInputError(
                f"distance: found shape {tuple(found.shape)} for logits {tuple(masked.shape)}, "
                f"allowed is [{len(masked)}], one number a token"
            )
        return found

    return of(full, masked) if options.fuse else distances(of, full, masked)


def _masks(
    importance: EdgeImportance, thresholds: Tensor, options: DensityOptions
) -> tuple[Sequence[LayerEdges], Sequence[LayerEdges]]:
    """Traces at the drawn thresholds as the size term sees them, and as the run is masked."""
    if options.family == "shallow":
        every = hard_masks(importance, 0.0)
        return every, every
    hard = options.masks == "straight"
    masks = (
        hard_masks(importance, thresholds)
        if hard
        else soft_masks(importance, thresholds, options.temperature)
    )
    if hard and options.size_weight > 0:
        return soft_masks(importance, thresholds, options.temperature), masks
    return masks, masks


def _size(
    importance: EdgeImportance,
    traces: Sequence[LayerEdges],
    weights: Tensor,
    options: DensityOptions,
) -> Tensor:
    """Weighted mean size of the traces; with gradients only if a size term wants them."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and options.size_weight > 0):
        return soft_size(importance, traces, weights).to(weights.dtype)
