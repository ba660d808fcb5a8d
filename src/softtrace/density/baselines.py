"""What a trace is compared with: connected subgraphs of the same size chosen badly.

Random ranks take edges in random order, the least important ones come first in the other; each with
the residual edges kept from the start or competing like all others. After arXiv 2605.27033,
section 4, whose "inverse" and random connected subgraph are others: :mod:`softtrace.graph.orders`.

Best-first search by such scores stalls: the output node has two edges, both among the worst, and
once one is in, most of the graph follows at a single score, so that no threshold shows the sizes
between. Where residual edges are not kept, every node's own best edge is kept from the start
instead: every threshold then leaves a subgraph that connects the output to the embedding.

Ranks over all edges of a sequence are numbers of which all have to exist, which they cannot where
sequences are long. So a random rank is a number that is hashed from the edge's name, and the rank
of an importance is read from a histogram of all of them: both are uniform over the edges, as ranks
are, made row by row, and the same whatever the batch, the blocks and the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrace.checks import check_choice
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import AttentionMap, MadeFrom, Rows, each_block
from softtrace.graph.edges import EdgeImportance, RowwiseEdges

Baseline = Literal["random_ranks", "least_important"]

NAMES_IN_FILES: dict[Baseline, str] = {
    "random_ranks": "random_connected",
    "least_important": "inverse",
}
"""What ``density.json`` calls them, since before they were renamed."""

_BINS = 1 << 15
_OCTAVES = 60  # from 1 down to where importances are nothing
_NODES = (4093, 4094, 4095)  # stand in for the head in names of edges of which a token has one
Score = Callable[[Tensor, int, Tensor, Tensor, Tensor | None], Tensor]
"""``(importances [B, H, n, m], layer, heads [H], targets [n], sources [m] or None) -> scores``."""


def baseline_scores(
    importance: EdgeImportance,
    kind: Baseline,
    *,
    keep_residual: bool,
    seed: int | Sequence[int] = 0,
) -> EdgeImportance:
    """Scores in place of importances, so that the same sweeps give the baseline's curves.

    Scores are in (0, 1] and uniform over the existing edges of each sequence, as ranks are: a
    threshold 1 - f keeps about the share f of them.

    Args:
        importance: of a batch.
        kind: ``"random_ranks"`` or ``"least_important"``.
        keep_residual: residual edges get a score above every threshold; otherwise the best edge
            into each node does, so that the subgraph stays connected at every threshold.
        seed: of the random scores, one for each sequence; an integer is that of the first one, and
            others count on from it.

    Raises:
        InvalidInputError: unknown kind, or not as many seeds as sequences.
    """
    check_choice("baseline", kind, get_args(Baseline))
    rows = len(importance.valid)
    seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
    if len(seeds) != rows:
        raise InvalidInputError(
            f"seed: found {len(seeds)} seeds for {rows} sequences, allowed is one for each, or a "
            "single integer"
        )
    score = _random(importance, seeds) if kind == "random_ranks" else _rarity(importance)
    found = []
    layers = zip(importance.layers, importance.visible, importance.existing(), strict=True)
    for number, (layer, seen, existing) in enumerate(layers):
        exists = existing.nodes()
        residual, mlp, mlp_residual = (
            _of_nodes(score, part, number, code) * there
            for part, code, there in zip(layer.nodes(), _NODES, exists, strict=True)
        )
        attention = MadeFrom(layer.attention_map, _scored(score, number, seen))
        connect = _keep_residual if keep_residual else _keep_best
        own = connect(RowwiseEdges(attention, residual, mlp, mlp_residual, layer.parallel), exists)
        found.append(own if isinstance(layer, RowwiseEdges) else own.held())
    return replace(importance, layers=tuple(found))


def baseline_thresholds() -> tuple[float, ...]:
    """14 thresholds that keep shares of the edges in geometric progression, from 1e-5 to 0.9."""
    shares = torch.logspace(-5, torch.tensor(0.9).log10().item(), 14, dtype=torch.float64)
    return tuple((1 - shares).tolist())


def _scored(score: Score, layer: int, seen: Tensor) -> Callable[[Tensor, Rows], Tensor]:
    """Scores of rows of importances, 0 where there is no edge ``[B, T, S]``."""

    def scored(values: Tensor, rows: Rows) -> Tensor:
        numbers = torch.arange(seen.shape[2], device=seen.device)
        heads = torch.arange(values.shape[1], device=seen.device)
        found = score(values, layer, heads, rows.of(numbers, 0), numbers[: rows.end])
        return found * rows.edges_of(seen)[:, None]

    return scored


def _of_nodes(score: Score, values: Tensor, layer: int, code: int) -> Tensor:
    """``[B, T]`` scores of edges of which a token has one."""
    tokens = torch.arange(values.shape[1], device=values.device)
    head = tokens.new_tensor([code])
    return score(values[:, None, :, None], layer, head, tokens, None)[:, 0, :, 0]


def _random(importance: EdgeImportance, seeds: Sequence[int]) -> Score:
    start = importance.valid.int().argmax(1)[:, None, None, None]  # padding moves no number
    seed = torch.tensor(seeds, device=start.device)[:, None, None, None] << 22

    def score(
        _: Tensor, layer: int, heads: Tensor, targets: Tensor, sources: Tensor | None
    ) -> Tensor:
        name = _mixed(seed + (layer << 12) + heads[:, None, None])
        place = (targets[:, None] - start) << 21
        place = place if sources is None else place + sources - start
        bits = (_mixed(name + place) >> 40) & 0xFFFFFF
        return 1 - bits.to(torch.float32) / (1 << 24)

    return score


def _mixed(numbers: Tensor) -> Tensor:
    """Int64 numbers whose bits all depend on all bits of what was given (splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return numbers ^ ((numbers >> 31) & ((1 << 33) - 1))


def _place(values: Tensor) -> Tensor:
    """The places of importances in the histogram, from 0 to the number of its bins."""
    octave = values.clamp_min(2.0**-_OCTAVES).log2() / _OCTAVES + 1
    return (octave * _BINS).clamp(0, _BINS - 1e-2)


def _rarity(importance: EdgeImportance) -> Score:
    """One minus the share of a sequence's edges that are less important."""
    batch = len(importance.valid)
    counts = torch.zeros(batch, _BINS, dtype=torch.int64, device=importance.valid.device)

    def count(values: Tensor, there: Tensor) -> None:
        for row, (own, exists) in enumerate(zip(_place(values).long(), there, strict=True)):
            counts[row] += own[exists].bincount(minlength=_BINS)

    for layer, existing in zip(importance.layers, importance.existing(), strict=True):
        for part, there in zip(layer.nodes(), existing.nodes(), strict=True):
            count(part, there)
        for rows, values in each_block(layer.attention_map, lambda values, _: values):
            count(values, existing.attention_map.rows(rows))
    total = counts.sum(1, keepdim=True).clamp_min(1).double()
    before = ((counts.cumsum(1) - counts) / total).float()
    own = (counts / total).float()

    def score(values: Tensor, *_: object) -> Tensor:
        place = _place(values)
        bin_of = place.long().flatten(1)
        inside = (place.flatten(1) - bin_of) * own.gather(1, bin_of)
        return (1 - before.gather(1, bin_of) - inside).clamp_min(1e-7).reshape(values.shape)

    return score


def _keep_residual(scores: RowwiseEdges, exists: Sequence[Tensor]) -> RowwiseEdges:
    residual, _, mlp_residual = (each.to(scores.mlp.dtype) for each in exists)
    return RowwiseEdges(scores.attention_map, residual, scores.mlp, mlp_residual, scores.parallel)


def _keep_best(scores: RowwiseEdges, exists: Sequence[Tensor]) -> RowwiseEdges:
    """The best edge into every node above every threshold."""
    highest, names = _highest(scores.attention_map)
    residual, mlp, mlp_residual = scores.nodes()
    at_attention = torch.maximum(highest, residual)
    at_mlp = torch.maximum(mlp, mlp_residual)
    if scores.parallel:  # one node
        at_attention = at_mlp = torch.maximum(at_attention, mlp)
    names = names.masked_fill((highest < at_attention) | (highest == 0), -1)

    def lift(part: Tensor, best: Tensor) -> Tensor:
        return torch.where((part == best) & (part > 0), 1.0, part)

    def lifted(values: Tensor, rows: Rows) -> Tensor:
        # By name too: rows that are made anew may differ in their last digit.
        own = _names(values, scores.shape[3]) == rows.of(names)[:, None, :, None]
        return lift(values, rows.of(at_attention)[:, None, :, None]).masked_fill_(own, 1.0)

    attention = MadeFrom(scores.attention_map, lifted)
    nodes = (
        lift(part, best) * there
        for part, best, there in zip(
            (residual, mlp, mlp_residual), (at_attention, at_mlp, at_mlp), exists, strict=True
        )
    )
    residual, mlp, mlp_residual = nodes
    return RowwiseEdges(attention, residual, mlp, mlp_residual, scores.parallel)


def _highest(scores: AttentionMap) -> tuple[Tensor, Tensor]:
    """``[B, T]``, each target's highest score, and the name of that edge."""
    found, names = [], []
    for rows in scores.blocks():
        values = scores.rows(rows).detach()
        best, place = values.transpose(1, 2).flatten(2).max(-1)
        found.append(best)
        names.append(_names(values, scores.shape[3])[:, 0].flatten()[place])
    return torch.cat(found, dim=1), torch.cat(names, dim=1)


def _names(values: Tensor, sources: int) -> Tensor:
    """``[H, 1, end]`` int64, a number for each edge ``[B, H, n, end]`` into a target."""
    heads, end = (torch.arange(values.shape[dim], device=values.device) for dim in (1, 3))
    return heads[:, None, None] * sources + end
