"""No way around the edges: what the graph says is masked must not reach the prediction.

That the outputs of a layer's sub-blocks add up does not say what the sub-blocks read. An MLP that
also reads an earlier node, values taken from another layer, a convolution over values: all of them
add up, and all carry something past the edges. Two masked runs of many short rows find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrace.anatomy.tolerances import mismatch
from softtrace.graph.attention_maps import as_map
from softtrace.graph.batch import Batch
from softtrace.graph.edges import EDGE_KINDS, EdgeImportance, LayerEdges
from softtrace.graph.trace import closure
from softtrace.tracing.runner import Runner
from softtrace.tracing.verification import Checks

_LENGTH = 6
_ROWS = 64  # of one run
_DRAWS = 16
_KEPT = {"attention": 0.25, "attention_residual": 0.6, "mlp": 0.6, "mlp_residual": 0.6}


@dataclass(frozen=True)
class _Row:
    """Tokens and masks of one row: ``[T]`` and a :class:`LayerEdges` a layer, without batch."""

    ids: Tensor
    masks: Sequence[LayerEdges]


def check_independence(runner: Runner, found: Checks, allowed: float, device: torch.device) -> None:
    """Cut every layer's nodes off their edges; then keep random edges, and those that matter alone.

    Args:
        runner: of the model; gradients and dropout are off.
        found: notes the mismatches.
        allowed: largest relative mismatch.
        device: of the model.

    Raises:
        UnsupportedModelError: something reaches the prediction that is no edge.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = runner.anatomy.vocabulary
    ids, other = torch.randint(vocabulary, (2, _LENGTH), generator=generator, device="cpu")
    recording = runner.record(Batch.of(ids[None].to(device)))
    attention = [as_map(each).whole().cpu() for each in recording.attention]
    valid = torch.ones(1, _LENGTH, dtype=torch.bool, device="cpu")
    seen = tuple(each.cpu() for each in recording.importance.visible)
    everything = EdgeImportance(
        tuple(each.map(Tensor.cpu) for each in recording.importance.layers), seen, valid
    )

    cuts = list(_cuts(everything))
    rows = [_Row(each, masks) for _, masks in cuts for each in (ids, other)]
    hidden = _hidden(runner, rows, attention, device)
    for (where, _), one, two in zip(cuts, hidden[::2], hidden[1::2], strict=True):
        error = mismatch(one, two)
        found.require(
            "nodes cut off their edges",
            error,
            allowed,
            f"{where}: with every edge into its nodes masked, the prediction still depends on the "
            f"tokens (by {error:.2g} of the largest value, allowed {allowed:.0e}). Something "
            "reaches later nodes past the edges: a sub-block that reads more than its node, or "
            "keys and values that layers share",
        )

    pairs = [_pair(everything, ids, other, generator) for _ in range(_DRAWS)]
    rows = [row for _, *both in pairs for row in both]
    hidden = _hidden(runner, rows, attention, device)
    for (position, *_), one, two in zip(pairs, hidden[::2], hidden[1::2], strict=True):
        error = mismatch(one[position], two[position])
        found.require(
            "edges that do not reach a prediction",
            error,
            allowed,
            f"a prediction depends on edges that do not reach it (by {error:.2g} of the largest "
            f"value, allowed {allowed:.0e}): sub-blocks read nodes in another order than the "
            f"pattern '{runner.anatomy.pattern}' says, or values of several tokens are mixed "
            "before attention",
        )


def _cuts(everything: EdgeImportance) -> Iterator[tuple[str, list[LayerEdges]]]:
    """All edges but those into the nodes of one half-layer (of one layer, if it is parallel)."""
    full = [_unbatched(layer.map(Tensor.float)) for layer in everything.existing()]
    for index, layer in enumerate(full):
        halves = [EDGE_KINDS] if layer.parallel else [EDGE_KINDS[:2], EDGE_KINDS[2:]]
        for kinds in halves:
            parts = {kind: getattr(layer, kind) * (kind not in kinds) for kind in EDGE_KINDS}
            masks = [
                *full[:index],
                LayerEdges(**parts, parallel=layer.parallel),
                *full[index + 1 :],
            ]
            half = (
                "" if layer.parallel else f", {'attention' if kinds[0] == 'attention' else 'MLP'}"
            )
            yield f"layer {index}{half}", masks


def _pair(
    everything: EdgeImportance, ids: Tensor, other: Tensor, generator: torch.Generator
) -> tuple[int, _Row, _Row]:
    """A position, random edges; and those of them that reach it, with other tokens elsewhere."""
    drawn = []
    for layer in everything.existing():
        parts = {}
        for kind, there in zip(EDGE_KINDS, layer, strict=True):
            coins = torch.rand(there.shape, generator=generator, device="cpu") < _KEPT[kind]
            parts[kind] = (coins & there).float()
        drawn.append(LayerEdges(**parts, parallel=layer.parallel))
    position = int(torch.randint(1, len(ids), (), generator=generator, device="cpu"))
    kept = EdgeImportance(tuple(drawn), everything.visible, everything.valid)
    reaching = [layer.map(lambda v: (v == 1).float()) for layer in closure(kept, 0, position)]
    first = reaching[0]
    reached = (first.attention_residual + first.attention.sum((0, 1))) > 0
    if first.parallel:
        reached = reached | (first.mlp > 0)
    row = _Row(ids, [_unbatched(layer) for layer in drawn])
    return position, row, _Row(torch.where(reached, ids, other), reaching)


def _unbatched(layer: LayerEdges) -> LayerEdges:
    return layer.map(lambda part: part[0])


def _batched(layers: Sequence[LayerEdges], device: torch.device) -> LayerEdges:
    parts = {
        kind: torch.stack([getattr(each, kind) for each in layers]).to(device)
        for kind in EDGE_KINDS
    }
    return LayerEdges(**parts, parallel=layers[0].parallel)


def _hidden(
    runner: Runner, rows: list[_Row], attention: list[Tensor], device: torch.device
) -> Tensor:
    """``[N, T, d_model]``: what the head reads in masked runs of the rows, in float32 at least."""
    found = []
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        ids = torch.stack([row.ids for row in part]).to(device)
        masks = [_batched(layers, device) for layers in zip(*(r.masks for r in part), strict=True)]
        recorded = [each.expand(len(part), -1, -1, -1).to(device) for each in attention]
        found.append(runner.masked_hidden(Batch.of(ids), masks, recorded, exact=True))
    hidden = torch.cat(found)
    return hidden.float() if hidden.dtype.itemsize < 4 else hidden
