"""What a trace is compared with: connected subgraphs of the same size chosen badly.

Random ranks take edges in random order, the least important ones come first in the other; each with
the residual edges kept from the start or competing like all others. After arXiv 2605.27033,
section 4, whose "inverse" and random connected subgraph are others: :mod:`softtrace.graph.orders`.

Best-first search by such scores stalls: the output node has two edges, both among the worst, and
once one is in, most of the graph follows at a single score, so that no threshold shows the sizes
between. Where residual edges are not kept, every node's own best edge is kept from the start
instead: every threshold then leaves a subgraph that connects the output to the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrace.density.rowwise_baselines import rowwise_scores
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EdgeImportance, LayerEdges, RowwiseEdges

Baseline = Literal["random_ranks", "least_important"]

NAMES_IN_FILES: dict[Baseline, str] = {
    "random_ranks": "random_connected",
    "least_important": "inverse",
}
"""What ``density.json`` calls them, since before they were renamed."""


def baseline_scores(
    importance: EdgeImportance,
    kind: Baseline,
    *,
    keep_residual: bool,
    seed: int | Sequence[int] = 0,
) -> EdgeImportance:
    """Scores in place of importances, so that the same sweeps give the baseline's curves.

    Scores are ranks in (0, 1], uniform over the existing edges of each sequence: a threshold
    1 - f keeps the share f of them. Of sequences so long that not all edges can be held they are
    those of :mod:`softtrace.density.rowwise_baselines`.

    Args:
        importance: of a batch.
        kind: ``"random_ranks"`` or ``"least_important"``.
        keep_residual: residual edges get a score above every threshold; otherwise the best edge
            into each node does, so that the subgraph stays connected at every threshold.
        seed: of the random scores; one for each sequence makes them independent of the batch that
            a sequence is in.

    Raises:
        InvalidInputError: unknown kind, or not as many seeds as sequences.
    """
    if kind not in get_args(Baseline):
        raise InvalidInputError(f"baseline: found {kind!r}, allowed are {get_args(Baseline)}")
    if isinstance(importance.layers[0], RowwiseEdges):
        rows = len(importance.valid)
        seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
        _check_seeds(seeds, rows)
        return rowwise_scores(
            importance,
            keep_residual=keep_residual,
            seeds=seeds if kind == "random_ranks" else None,
        )
    existing = importance.existing()
    shapes = [[part.shape for part in layer] for layer in importance.layers]
    there = _flatten(existing)
    order = _random(there, seed) if kind == "random_ranks" else -_flatten(importance.layers)
    # Absent edges go last, so that ranks of existing ones are dense from the top.
    order = order.masked_fill(~there, -torch.inf)
    rank = order.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    count = there.sum(-1, keepdim=True).clamp_min(1)
    score = (1 - rank.double() / count).masked_fill(~there, 0.0)
    layers = []
    start = 0
    for layer, layer_shapes in zip(importance.layers, shapes, strict=True):
        parts = []
        for shape in layer_shapes:
            size = shape[1:].numel()
            parts.append(score[:, start : start + size].reshape(shape))
            start += size
        attention, attention_residual, mlp, mlp_residual = parts
        layers.append(LayerEdges(attention, attention_residual, mlp, mlp_residual, layer.parallel))
    connect = _keep_residual if keep_residual else _keep_best
    return replace(
        importance,
        layers=tuple(
            connect(layer, exists) for layer, exists in zip(layers, existing, strict=True)
        ),
    )


def _check_seeds(seeds: Sequence[int], sequences: int) -> None:
    if len(seeds) != sequences:
        raise InvalidInputError(
            f"seed: found {len(seeds)} seeds for {sequences} sequences, allowed is one for "
            "each, or a single integer"
        )


def _random(there: Tensor, seed: int | Sequence[int]) -> Tensor:
    """Numbers in [0, 1) of the shape ``[B, all edges]``."""
    if isinstance(seed, int):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(there.shape, generator=generator, device="cpu").to(there.device)
    _check_seeds(seed, len(there))
    rows = torch.empty(there.shape, device="cpu")
    for row, number, exists in zip(rows, seed, there, strict=True):
        generator = torch.Generator().manual_seed(number)
        # Drawn for the edges that exist, in their order: padding moves no other edge's number.
        row[exists.cpu()] = torch.rand(int(exists.sum()), generator=generator, device="cpu")
    return rows.to(there.device)


def _keep_residual(scores: LayerEdges, exists: LayerEdges) -> LayerEdges:
    """Residual edges above every threshold."""
    return replace(
        scores,
        attention_residual=exists.attention_residual.to(scores.mlp.dtype),
        mlp_residual=exists.mlp_residual.to(scores.mlp.dtype),
    )


def _keep_best(scores: LayerEdges, exists: LayerEdges) -> LayerEdges:
    """The best edge into every node above every threshold; scores are ranks, so it is one edge."""
    at_attention = torch.maximum(scores.attention.amax((1, 3)), scores.attention_residual)
    at_mlp = torch.maximum(scores.mlp, scores.mlp_residual)
    if scores.parallel:  # one node
        at_attention = at_mlp = torch.maximum(at_attention, scores.mlp)

    def lift(part: Tensor, best: Tensor, there: Tensor) -> Tensor:
        return torch.where((part == best) & there, 1.0, part)

    return LayerEdges(
        lift(scores.attention, at_attention[:, None, :, None], exists.attention),
        lift(scores.attention_residual, at_attention, exists.attention_residual),
        lift(scores.mlp, at_mlp, exists.mlp),
        lift(scores.mlp_residual, at_mlp, exists.mlp_residual),
        scores.parallel,
    )


def baseline_thresholds(count: int = 14) -> tuple[float, ...]:
    """Thresholds that keep a geometric share of the edges, from 1e-5 to 0.9."""
    shares = torch.logspace(-5, torch.tensor(0.9).log10().item(), count, dtype=torch.float64)
    return tuple((1 - shares).tolist())


def _flatten(layers: tuple[LayerEdges, ...]) -> Tensor:
    """``[B, all edges]`` in the order of layers and kinds."""
    return torch.cat([part.flatten(1) for layer in layers for part in layer], dim=1)
