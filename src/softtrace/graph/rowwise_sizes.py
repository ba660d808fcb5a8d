"""Identity 4 block by block: sizes of the traces of some positions, and what those traces need.

One backward sweep over the layers, as :func:`softtrace.graph.sizes.edge_counts` makes at one go;
here an attention map's rows are made in blocks, and only those that a position needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from softtrace.graph.attention_maps import AttentionMap, MadeFrom, Rows, chunk_elements, each_block
from softtrace.graph.edges import LayerEdges, RowwiseEdges

_SWEPT = 8  # blocks' worth of numbers that sweeps may hold together


class _Sweep:
    """Who reaches which node, from the last layer down, under several sets of masks at once.

    The sets lie one after the other in the batch: for each of them by itself a GPU would wait for
    the launches of small operations.

    Args:
        sets: per set of masks and layer, all of the same shape.
        places: see :func:`traces_at`.
    """

    def __init__(self, sets: Sequence[Sequence[LayerEdges]], places: Tensor | None) -> None:
        batch, _, length, _ = sets[0][0].shape
        self.sets = sets
        mlp = sets[0][0].mlp
        dtype = torch.promote_types(mlp.dtype, torch.float32)  # of masks: soft ones may be float64
        self.reach = from_outputs(batch, length, places, mlp.device).to(dtype)
        self.reach = self.reach.repeat(len(sets), 1, 1)
        self._counted: list[Tensor] = []
        self._needed: list[list[LayerEdges]] = [[] for _ in sets]

    def begin(self, index: int) -> Tensor:
        """Move on to a layer; ``[K, B, T]`` bool, whose attention edges each set needs there."""
        self.layers = [masks[index] for masks in self.sets]
        nodes = zip(*(layer.nodes() for layer in self.layers), strict=True)
        self._nodes = residual, mlp, mlp_residual = [
            torch.cat(parts).to(self.reach.dtype) for parts in nodes
        ]
        parallel = self.layers[0].parallel
        self._at_end = self.reach
        if not parallel:
            self.reach = self.reach * (mlp + mlp_residual).clamp(max=1)[:, None]
        self._into = residual + mlp if parallel else residual
        self._degrees, self._before = torch.zeros_like(mlp), torch.zeros_like(self.reach)
        self._used = self._reached(self.reach)
        return self._used

    def add(self, rows: Rows, kept: Sequence[Tensor]) -> None:
        """Take in some rows: per set ``[B, n, end]``, how many heads keep an edge."""
        heads = torch.cat(tuple(kept))
        rows.place(self._degrees, heads.sum(-1))
        step = rows.add_own(heads, self._into).clamp_(max=1)
        self._before[..., : rows.end].baddbmm_(rows.of(self.reach, 2), step)

    def end(self, targets: Sequence[Tensor | None]) -> None:
        """Finish the layer; per set, targets are those outside of which nothing is needed."""
        residual, mlp, mlp_residual = self._nodes
        counts = (
            products(self.reach, (self._degrees, residual)),
            products(self._at_end, (mlp, mlp_residual)),
        )
        self._counted.insert(0, torch.cat(counts, dim=-1))
        each = zip(self.layers, self._used, self._reached(self._at_end), targets, strict=True)
        for needed, found in zip(self._needed, each, strict=True):
            needed.insert(0, _within(*found))
        self.reach = self._before.clamp(max=1)

    def found(self) -> list[tuple[Tensor, tuple[LayerEdges, ...]]]:
        """What :func:`traces_at` gives, for each set of masks."""
        counts = torch.stack(self._counted, dim=2).chunk(len(self.sets))
        return [(own, tuple(needed)) for own, needed in zip(counts, self._needed, strict=True)]

    def _reached(self, reach: Tensor) -> Tensor:
        """``[K, B, T]`` bool, whether a node reaches any output node."""
        found = reach.amax(1) > 0
        return found.view(len(self.sets), -1, found.shape[1])


def traces_at(
    masks: Sequence[LayerEdges], places: Tensor | None = None
) -> tuple[Tensor, tuple[LayerEdges, ...]]:
    """``edge_counts`` of chosen positions, and the masks of what reaches any of them.

    Args:
        masks: per layer, bool or floating; edges into a token come from no later one.
        places: ``[B, n]`` int64, n positions of every sequence; None for all.

    Returns:
        ``[B, n, L, 4]`` float64 (differentiable if the masks are), and per layer the masks without
        nodes that reach no such position.
    """
    sweep = _Sweep([masks], places)
    with torch.autocast(sweep.reach.device.type, enabled=False):
        for index in reversed(range(len(masks))):
            targets, _ = _targets_of(sweep.begin(index), places)
            for rows, kept in each_block(masks[index].attention_map, _over_heads, targets):
                sweep.add(rows, [kept])
            sweep.end([targets])
    (found,) = sweep.found()
    return found


def traces_at_each(
    scores: Sequence[LayerEdges], masks: Sequence[Sequence[LayerEdges]], places: Tensor | None
) -> list[tuple[Tensor, tuple[LayerEdges, ...]]]:
    """:func:`traces_at` under several masks that are made from the same scores, made once.

    Args:
        scores: per layer, :class:`softtrace.graph.edges.RowwiseEdges`.
        masks: several times per layer, of :func:`softtrace.graph.masks.hard_masks`.
        places: see :func:`traces_at`.
    """
    batch, _, length, _ = scores[0].shape
    count = length if places is None else places.shape[1]
    device = scores[0].mlp.device
    together = max(1, _SWEPT * chunk_elements(device) // (batch * count * length))
    found = []
    for start in range(0, len(masks), together):
        sets = masks[start : start + together]
        sweep = _Sweep(sets, places)
        with torch.autocast(device.type, enabled=False):
            for index in reversed(range(len(scores))):
                used = sweep.begin(index)
                of_all = scores[index].attention_map
                own = [each[index].attention_map for each in sets]
                targets, each_targets = _targets_of(used, places)
                for rows in of_all.blocks(targets):
                    values = of_all.rows(rows)
                    made = (_made(each, of_all, values, rows) for each in own)
                    sweep.add(rows, [summed_heads(m, torch.float32, traced=False) for m in made])
                sweep.end(each_targets)
        found += sweep.found()
    return found


def _made(mask: AttentionMap, scores: AttentionMap, values: Tensor, rows: Rows) -> Tensor:
    """Rows of a mask that is made from scores whose rows are there."""
    assert isinstance(mask, MadeFrom)
    return mask.rows_from(scores, values, rows)


def _targets_of(used: Tensor, places: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
    """The targets that any set of ``[K, B, T]`` needs, and those of each; CPU, None for all.

    Of all positions nearly all rows are needed; to ask which would wait for the device.
    """
    if places is None:
        return None, [None] * len(used)
    known = used.any(1).cpu()  # waits for the device, once a layer
    return known.any(0).nonzero()[:, 0], [each.nonzero()[:, 0] for each in known]


def _within(layer: LayerEdges, middle: Tensor, end: Tensor, targets: Tensor | None) -> LayerEdges:
    """Edges into some nodes alone, ``[B, T]`` bool after attention and after the MLP."""
    residual, mlp, mlp_residual = (
        part & into if part.dtype == torch.bool else part * into
        for part, into in zip(layer.nodes(), (middle, end, end), strict=True)
    )
    attention = MadeFrom(layer.attention_map, lambda values, _: values, targets)
    return RowwiseEdges(attention, residual, mlp, mlp_residual, layer.parallel)


def from_outputs(batch: int, length: int, places: Tensor | None, device: torch.device) -> Tensor:
    """``[B, n, T]``, 1 where a node of the last layer is an output node."""
    if places is None:
        return torch.eye(length, dtype=torch.float32, device=device).expand(batch, -1, -1)
    return one_hot(places.to(device), length).float()


def _over_heads(kept: Tensor, rows: Rows) -> Tensor:
    """``[B, n, end]``, how many heads keep an edge."""
    return summed_heads(kept, torch.promote_types(kept.dtype, torch.float32))


def summed_heads(kept: Tensor, dtype: torch.dtype, *, traced: bool = True) -> Tensor:
    """``[B, n, S]``, masks ``[B, H, n, S]`` summed over the heads.

    Args:
        kept: the masks.
        dtype: of the sums.
        traced: whether a compiler may read this: one for GPUs cannot lower a sum of bytes.
    """
    device = kept.device.type
    as_bytes = device == "cpu" or (device == "cuda" and not traced)
    if kept.dtype == torch.bool and as_bytes and kept.shape[1] < 256:
        # Any other sum casts all of them before it adds them up.
        kept = kept.view(torch.uint8).sum(1, keepdim=True, dtype=torch.uint8)
    return kept.sum(1, dtype=dtype)


def products(reach: Tensor, degrees: Sequence[Tensor]) -> Tensor:
    """``[B, n, X]`` float64: degrees ``[B, T]`` summed over the nodes that reach ``[B, n, T]``."""
    wide = torch.float32 if reach.device.type == "mps" else torch.float64
    columns = torch.stack(tuple(degrees), dim=-1).to(wide)
    step = max(1, chunk_elements(reach.device) // (reach.shape[0] * reach.shape[2]))
    found = torch.cat([part.to(wide) @ columns for part in torch.split(reach, step, dim=1)], dim=1)
    return found if reach.device.type == "mps" else found.double()
