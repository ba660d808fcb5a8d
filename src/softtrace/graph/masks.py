"""Masks over edges: hard and soft.

A mask is a tuple of :class:`LayerEdges` with values in [0, 1]. Absent edges are 0. An early-phase
subgraph needs no mask of its own: a run under these masks is read before it ends, see
:meth:`softtrace.tracing.instrument.Instrument.exit_logits`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softtrace.checks import check_range
from softtrace.graph.attention_maps import MadeFrom, Rows
from softtrace.graph.edges import EdgeImportance, LayerEdges, RowwiseEdges


def per_sequence(threshold: Tensor, values: Tensor) -> Tensor:
    """Shape ``[B]`` (or a scalar) so that it broadcasts over ``[B, ...]``."""
    return threshold.reshape(-1, *(1 for _ in values.shape[1:])) if threshold.dim() else threshold


def hard_masks(importance: EdgeImportance, threshold: Tensor | float) -> tuple[LayerEdges, ...]:
    """Keep every existing edge of importance >= threshold.

    Args:
        importance: of a batch.
        threshold: one number for all or ``[B]``, one a sequence.

    Returns:
        bool masks: constants, through which no gradient reaches the importances.
    """
    layers, existing = importance.layers, importance.existing()
    # The three edges a token of all layers at once: on a GPU each comparison is a launch.
    nodes, there = (
        torch.stack([part for layer in each for part in layer.nodes()])
        for each in (layers, existing)
    )
    cut = threshold if isinstance(threshold, Tensor) else nodes.new_tensor(threshold)
    kept = iter(((nodes >= cut[..., None]) & there).unbind())
    found: list[LayerEdges] = []
    for layer, exists, seen in zip(layers, existing, importance.visible, strict=True):
        own = next(kept), next(kept), next(kept), layer.parallel
        if isinstance(layer, RowwiseEdges):
            found.append(RowwiseEdges(MadeFrom(layer.attention_map, _keep(cut, seen)), *own))
        else:
            keep = (layer.attention >= per_sequence(cut, layer.attention)) & exists.attention
            found.append(LayerEdges(keep, *own))
    return tuple(found)


def _keep(cut: Tensor, seen: Tensor) -> Callable[[Tensor, Rows], Tensor]:
    """Which of some rows of importances are kept; thresholds ``[]`` or ``[B]``, ``[B, T, S]``."""
    return lambda scores, rows: (scores >= per_sequence(cut, scores)) & rows.edges_of(seen)[:, None]


def soft_masks(
    importance: EdgeImportance, threshold: Tensor | float, temperature: float
) -> tuple[LayerEdges, ...]:
    """sigmoid((log importance - log threshold) / temperature), differentiable in the importances.

    Args:
        importance: of a batch.
        threshold: in (0, 1], one number or ``[B]``.
        temperature: in nats of importance, > 0; towards 0 the masks become hard.

    Raises:
        InvalidInputError: temperature not positive.
    """
    check_range("temperature", temperature, 0.0, float("inf"), open_low=True)

    def soften(scores: Tensor, there: Tensor) -> Tensor:
        tiny = torch.finfo(scores.dtype).tiny
        cut = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
        log_cut = per_sequence(cut, scores).log()
        # Only existing edges reach the log, so that no gradient is 0 · infinity.
        log_scores = scores.masked_fill(~there, 1.0).clamp_min(tiny).log()
        return ((log_scores - log_cut) / temperature).sigmoid() * there

    def softened(layer: LayerEdges, exists: LayerEdges) -> LayerEdges:
        def rows_of(scores: Tensor, rows: Rows) -> Tensor:
            return soften(scores, exists.attention_map.rows(rows))

        residual, mlp, mlp_residual = map(soften, layer.nodes(), exists.nodes())
        if isinstance(layer, RowwiseEdges):
            made = MadeFrom(layer.attention_map, rows_of)
            return RowwiseEdges(made, residual, mlp, mlp_residual, layer.parallel)
        attention = soften(layer.attention, exists.attention)
        return LayerEdges(attention, residual, mlp, mlp_residual, layer.parallel)

    with torch.autocast(importance.valid.device.type, enabled=False):
        return tuple(
            softened(layer, exists)
            for layer, exists in zip(importance.layers, importance.existing(), strict=True)
        )
