"""A literal reference for every family of the zoo: each edge's vector, by the model's own modules.

What each family's layer does is written down in :mod:`tests.support.layouts`. Attention
probabilities are the model's own, from its eager code. Nothing of softtrace is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.support.layouts import LAYOUTS, LLAMA, Layout, Module

#: norms that multiply with their weight plus one; those of a LayerNorm's kind by their name
PLUS_ONE = (
    *("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm"),
    *("MiniMaxM3VLRMSNorm", "NemotronLayerNorm1P"),
)


def linear_part(norm: Module, part: Tensor) -> Tensor:
    """A norm without its scale and bias."""
    if "LayerNorm" in type(norm).__name__:
        part = part - part.mean(-1, keepdim=True)
    weight = getattr(norm, "weight", None)
    if weight is None:
        return part
    return part * (weight + 1 if type(norm).__name__ in PLUS_ONE else weight)


def scale_of(norm: Module, full: Tensor) -> Tensor:
    """``[..., 1]``: what the norm multiplies a vector's linear part with."""
    linear, normed = linear_part(norm, full), norm(full)
    if getattr(norm, "bias", None) is not None:
        normed = normed - norm.bias
    largest = linear.abs().argmax(-1, keepdim=True)
    return normed.gather(-1, largest) / linear.gather(-1, largest)


def at(module: Module, path: str | None) -> Module:
    """The attribute at a path; the identity for None."""
    if path is None:
        return torch.nn.Identity()
    for name in path.split("."):
        module = getattr(module, name)
    return module


@dataclass(frozen=True)
class Layer:
    """Importances or masks of one layer: ``[B, H, T, S]`` and three ``[B, T]``."""

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor


@dataclass(frozen=True)
class Reference:
    """A model's own attention, its layout, and its embedding of a padded batch."""

    model: Module
    layout: Layout
    probabilities: tuple[Tensor, ...]
    embedding: Tensor
    logits: Tensor

    @property
    def layers(self) -> list[Module]:
        """First to last."""
        return list(at(self.model, self.layout.layers))

    def values(self, layer: Module, node: Tensor, heads: int) -> Tensor:
        """``[B, H, S, d]``: values of every query head."""
        layout = self.layout
        attention = at(layer, layout.attention)
        found = layout.values(attention, at(layer, layout.before_attention)(node), heads)
        return found.transpose(1, 2).repeat_interleave(heads // found.shape[2], dim=1)

    def output_weight(self, layer: Module, heads: int) -> Tensor:
        """``[H, d, d_model]``."""
        projection = at(at(layer, self.layout.attention), self.layout.projection)
        weight = projection.weight
        if type(projection).__name__ != "Conv1D":
            weight = weight.T
        return weight.reshape(heads, -1, weight.shape[-1])  # type: ignore[no-any-return]

    def run(self, masks: list[Layer] | None) -> tuple[Tensor, list[Layer]]:
        """Logits with every edge times its mask, and the importances of the edges as they are.

        Importances mean something only without masks. Edges into padding are not looked at.
        """
        layout, x = self.layout, self.embedding
        importances = []
        for index, layer in enumerate(self.layers):
            a = self.probabilities[index]
            heads, last = a.shape[1], index == len(self.layers) - 1
            mask = masks[index] if masks else Layer(*(torch.ones(1) for _ in range(4)))
            seen = a * mask.attention
            v, weight = self.values(layer, x, heads), self.output_weight(layer, heads)
            # [B, H, T, S, d_model]: the vector of every attention edge
            vectors = seen[..., None] * (v @ weight)[:, :, None]
            projection = at(at(layer, layout.attention), layout.projection)
            raw = vectors.sum((1, 3))
            if getattr(projection, "bias", None) is not None:
                raw = raw + projection.bias
            norm = at(layer, layout.after_attention)
            times = getattr(layer, layout.multiplier) if layout.multiplier else 1.0
            added = norm(raw) * times
            if layout.after_attention is not None:
                vectors = linear_part(norm, vectors) * scale_of(norm, raw)[:, None, :, None]
            vectors = vectors * times
            residual = mask.attention_residual[..., None] * x
            if layout.parallel:
                mlp = self.mlp(layer, x) * times
                kept = mask.mlp[..., None] * mlp
                parts = [vectors, residual[:, None, :, None], kept[:, None, :, None]]
                x = residual + added + kept
                sizes = self.sizes(parts, last)
                total = sizes[0].sum((1, 3)) + sizes[1][:, 0, :, 0] + sizes[2][:, 0, :, 0]
                attention = sizes[0] / total[:, None, :, None]
                shares = [each[:, 0, :, 0] / total for each in sizes[1:]]
                importances.append(Layer(attention, *shares, torch.zeros_like(total)))
                continue
            sizes = self.sizes([vectors, residual[:, None, :, None]], False)
            total = sizes[0].sum((1, 3)) + sizes[1][:, 0, :, 0]
            shares = [sizes[0] / total[:, None, :, None], sizes[1][:, 0, :, 0] / total]
            x = residual + added
            kept = mask.mlp[..., None] * self.mlp(layer, x) * times
            residual = mask.mlp_residual[..., None] * x
            sizes = self.sizes([kept, residual], last)
            shares += [each / (sizes[0] + sizes[1]) for each in sizes]
            x = residual + kept
            importances.append(Layer(*shares))
        return self.read_out(x), importances

    def sizes(self, parts: list[Tensor], last: bool) -> list[Tensor]:
        """L1 norms; into the last node as the final norm reads them (its scale cancels)."""
        norm = at(self.model, self.layout.final_norm)
        return [(linear_part(norm, part) if last else part).abs().sum(-1) for part in parts]

    def mlp(self, layer: Module, node: Tensor) -> Tensor:
        """``[B, T, d_model]``: what the MLP sub-block gives, before a multiplier."""
        layout = self.layout
        normed = at(layer, layout.before_mlp)(node)
        return at(layer, layout.after_mlp)(layout.mlp(layer, normed))  # type: ignore[no-any-return]

    def read_out(self, node: Tensor) -> Tensor:
        """Logits of last nodes."""
        normed, config = at(self.model, self.layout.final_norm)(node), self.model.config
        if self.layout.shrunk:
            normed = normed / (config.hidden_size / config.dim_model_base)
        return self.layout.logits(self.model, at(self.model, self.layout.head)(normed))


def reference(case: str, model: Module, inputs: dict[str, Tensor]) -> Reference:
    """Run the model's own eager code on a batch and keep what the reference needs of it."""
    layout = LAYOUTS.get(case, LLAMA)
    kept = model.config._attn_implementation
    mixed: list[Tensor] = []
    handles = [
        at(at(layer, layout.attention), layout.projection).register_forward_pre_hook(
            lambda module, args: mixed.append(args[0])
        )
        for layer in at(model, layout.layers)
    ]
    fused = case.startswith("falcon")  # its eager code adds alibi twice
    try:
        with recorded_sdpa() as found:
            if not fused:
                model.set_attn_implementation("eager")
            own = model(
                **inputs, use_cache=False, output_attentions=not fused, output_hidden_states=True
            )
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(kept)
    visible = inputs["attention_mask"].bool()[:, None, None, :]
    probabilities = [each.masked_fill(~visible, 0.0) for each in (found or own.attentions)]
    result = Reference(model, layout, tuple(probabilities), own.hidden_states[0], own.logits)
    if not layout.sink_after:
        return result
    for index, layer in enumerate(result.layers):
        a = probabilities[index]
        heads = a.shape[1]
        without = (a @ result.values(layer, own.hidden_states[index], heads)).transpose(1, 2)
        with_sink = mixed[index].reshape(without.shape)
        share = (with_sink * without).sum(-1) / (without * without).sum(-1)
        probabilities[index] = a * share.transpose(1, 2)[..., None]
    return replace(result, probabilities=tuple(probabilities))


@contextmanager
def recorded_sdpa() -> Iterator[list[Tensor]]:
    """PyTorch's fused attention, written out; what its softmax gives is noted."""
    noted: list[Tensor] = []
    fused = functional.scaled_dot_product_attention

    def literal(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
    ) -> Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -1e30)
        else:
            scores = scores + attn_mask
        noted.append(scores.softmax(-1))
        return noted[-1] @ value

    functional.scaled_dot_product_attention = literal  # type: ignore[assignment]
    try:
        yield noted
    finally:
        functional.scaled_dot_product_attention = fused
