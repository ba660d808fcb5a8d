"""What stands in for an absent edge: nothing, as in the paper, or its mean over a text.

Replacing a part of a model by its mean rather than by nothing is usual where circuits are looked
for (Wang et al., arXiv 2211.00593): a mean keeps what the part says of every text alike. An absent
attention edge then carries the mean value of its head, times its own probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from softtrace.anatomy.anatomy import Anatomy
from softtrace.graph.attention_maps import AttentionMap, each_block
from softtrace.graph.batch import Batch
from softtrace.graph.edges import LayerEdges
from softtrace.model.hooks import Hook, on_input
from softtrace.tracing.masking import MaskedRun
from softtrace.tracing.run import Run


@dataclass(frozen=True)
class LayerMeans:
    """Means over the real tokens of a text, of one layer.

    Attributes:
        value: ``[H_kv · d_head]``, the values of its heads.
        entry: ``[d_model]``, the residual stream that enters the layer.
        middle: ``[d_model]``, the one that the MLP reads.
        mlp: ``[d_model]``, each part of what the MLP adds, before ``mlp_scale``.
    """

    value: Tensor
    entry: Tensor
    middle: Tensor
    mlp: tuple[Tensor, ...]


class MeansRun(Run):
    """Sums what the layers' parts are at the real tokens of a batch, in float64."""

    def __init__(self, anatomy: Anatomy, batch: Batch) -> None:
        super().__init__(anatomy, batch)
        self.sums: list[dict[str, Tensor]] = [{} for _ in anatomy.layers]

    def _add(self, layer: int, name: str, values: Tensor) -> None:
        """``[B, T, ...]`` values of a part."""
        self.sums[layer][name] = values[self.valid.to(values.device)].double().flatten(1).sum(0)

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        self._add(self.layer_of(module), "value", value.transpose(1, 2))
        return probabilities

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        self._add(layer, "entry", self.entry)
        return output

    @override
    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        self._add(layer, f"mlp {part}", output)
        if not self.anatomy.layers[layer].parallel:
            self._add(layer, "middle", self.middle)
        return output

    def means(self, layer: int, totals: dict[str, Tensor], tokens: int) -> LayerMeans:
        """The means of a layer, from sums over so many tokens, in the dtype of the run."""
        dtype = self.entry.dtype
        found = {name: (total / tokens).to(dtype) for name, total in totals.items()}
        parts = tuple(
            found[f"mlp {part}"] for part in range(len(self.anatomy.layers[layer].mlp_out))
        )
        return LayerMeans(
            found["value"], found["entry"], found.get("middle", found["entry"]), parts
        )


class MeanMaskedRun(MaskedRun):
    """A masked run in which means stand in for absent edges; every node is computed exactly."""

    def __init__(
        self,
        anatomy: Anatomy,
        batch: Batch,
        masks: Sequence[LayerEdges],
        means: Sequence[LayerMeans],
        attention: Sequence[Tensor | AttentionMap] | None = None,
    ) -> None:
        super().__init__(anatomy, batch, masks, attention, exact=True)
        self.reads_visible = True
        self.means = means
        self._absent: Tensor | None = None

    @override
    def hooks(self) -> list[Hook]:
        hooks = super().hooks()
        for index, modules in enumerate(self.anatomy.layers):
            hooks.append(Hook(modules.projection, on_input(partial(self._mixed, index)), True))
        return hooks

    @override
    def on_attention(
        self, module: nn.Module, probabilities: AttentionMap, value: Tensor, visible: Tensor
    ) -> AttentionMap:
        kept = super().on_attention(module, probabilities, value, visible)
        # ``[B, H, T]``, of all absent edges of a target
        self._absent = _row_sums(probabilities, visible) - _row_sums(kept, visible)
        return kept

    def _mixed(self, layer: int, heads: Tensor) -> Tensor:
        """What the output projection reads, with the mean values of absent edges."""
        assert self._absent is not None
        count = self.anatomy.heads
        value = self.means[layer].value.reshape(-1, heads.shape[-1] // count)
        value = value.repeat_interleave(count // len(value), 0)
        added = self._absent.transpose(1, 2)[..., None] * value
        return heads + added.to(heads.dtype).reshape(heads.shape)

    @override
    def after_attention(self, layer: int, read: Tensor, output: Tensor) -> Tensor:
        found = super().after_attention(layer, read, output)
        self._add((1 - self._gates(layer, output)[0]) * self.means[layer].entry)
        return found

    @override
    def after_mlp(self, layer: int, part: int, output: Tensor) -> Tensor:
        found = super().after_mlp(layer, part, output)
        modules, means = self.anatomy.layers[layer], self.means[layer]
        _, gate, beside = self._gates(layer, output)
        self._add(modules.mlp_scale * (1 - gate) * means.mlp[part])
        if part == 0 and not modules.parallel:
            self._add((1 - beside) * means.middle)
        return found


def _row_sums(probabilities: AttentionMap, visible: Tensor) -> Tensor:
    """``[B, H, T]``, over the sources that exist."""
    parts = each_block(
        probabilities,
        lambda values, rows: torch.where(rows.edges_of(visible)[:, None], values, 0.0).sum(-1),
    )
    return torch.cat([part for _, part in parts], dim=-1)
