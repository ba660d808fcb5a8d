"""What a residual pattern has to say about a model: where its half-layers are, and their names.

A pattern is declarative: tuples of attribute names to try, in order. Whether the modules found
really add up to the graph is not the pattern's word but the attach-time proof's (``proof.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softtrace.errors import UnsupportedModelError

_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class LayerModules:
    """The modules of one decoder layer that the instrument listens to."""

    layer: nn.Module
    attention: nn.Module
    output_projection: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    score_projections: tuple[nn.Module, ...] = ()
    """What makes queries and keys and nothing else; empty where they share a module with values."""


@dataclass(frozen=True)
class Anatomy:
    """A causal language model taken apart: the layers in order, what follows them, the sizes."""

    pattern: str
    layers: tuple[LayerModules, ...]
    final_norm: nn.Module
    head: nn.Module
    heads: int
    vocabulary: int
    positions: int | None = None
    """Length of the longest sequence with learned positions; None where they are computed."""

    def output_weight(self, layer: int) -> Tensor:
        """``W_O`` of a layer as ``[H, d_head, d_model]``, whatever way its module stores it."""
        projection = self.layers[layer].output_projection
        weight = projection.weight
        if not isinstance(weight, Tensor):
            raise UnsupportedModelError(f"layer {layer}: output projection has no weight tensor")
        matrix = weight if isinstance(projection, Conv1D) else weight.T
        return matrix.reshape(self.heads, -1, matrix.shape[-1])

    def output_bias(self, layer: int) -> Tensor | None:
        """Bias of a layer's output projection, ``[d_model]``: a constant of the node, no edge."""
        bias = getattr(self.layers[layer].output_projection, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def linearised_final_norm(self, part: Tensor) -> Tensor:
        """Apply the elementwise part of the final norm to a part of its input ``[..., d_model]``.

        The norm's scale, computed from the full vector, multiplies every part alike and cancels in
        an importance; what remains is the elementwise weight, after centring for a LayerNorm.
        """
        if isinstance(self.final_norm, nn.LayerNorm):
            part = part - part.mean(-1, keepdim=True)
        weight = getattr(self.final_norm, "weight", None)
        return part if weight is None else part * weight.to(part.dtype)


@dataclass(frozen=True)
class Pattern:
    """Attribute names of a residual layout, tried in order; the first that exists is taken."""

    name: str
    layers: tuple[str, ...]
    attention: tuple[str, ...]
    output_projection: tuple[str, ...]
    mlp_norm: tuple[str, ...]
    mlp: tuple[str, ...]
    final_norm: tuple[str, ...]
    score_projections: tuple[str, ...] = ()

    def find(self, model: nn.Module) -> Anatomy:
        """Locate the pattern's modules in ``model``.

        Raises:
            UnsupportedModelError: something the pattern needs is missing or of an unknown kind.
        """
        decoder = _decoder(model)
        layers = _child(decoder, self.layers, "the stack of layers")
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {type(decoder).__name__} has no ModuleList of layers "
                f"under any of {', '.join(self.layers)}"
            )
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if callable(find_head) else None
        if not isinstance(head, nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language-model head; load it with "
                "AutoModelForCausalLM, not AutoModel"
            )
        config = model.config
        return Anatomy(
            pattern=self.name,
            layers=tuple(self._layer(index, layer) for index, layer in enumerate(layers)),
            final_norm=_child(decoder, self.final_norm, "the final norm"),
            head=head,
            heads=int(config.num_attention_heads),  # type: ignore[arg-type, union-attr]
            vocabulary=int(config.vocab_size),  # type: ignore[union-attr, arg-type]
            positions=learned_positions(model),
        )

    def _layer(self, index: int, layer: nn.Module) -> LayerModules:
        where = f"layer {index} ({type(layer).__name__})"
        attention = _child(layer, self.attention, f"{where}: attention")
        projection = _child(attention, self.output_projection, f"{where}: output projection")
        if not isinstance(projection, nn.Linear | Conv1D):
            raise UnsupportedModelError(
                f"{where}: the output projection is a {type(projection).__module__}."
                f"{type(projection).__name__}; its effective weight is not known to softtrace. "
                "Allowed: torch.nn.Linear, transformers Conv1D. Merge adapters "
                "(model.merge_and_unload()) or load unquantised weights first."
            )
        return LayerModules(
            layer=layer,
            attention=attention,
            output_projection=projection,
            mlp_norm=_child(layer, self.mlp_norm, f"{where}: norm before the MLP"),
            mlp=_child(layer, self.mlp, f"{where}: MLP"),
            score_projections=tuple(
                child
                for name, child in attention.named_children()
                if name in self.score_projections
            ),
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a model with learned positions takes; None for any other model."""
    decoder = _find_decoder(model)
    for name in _LEARNED_POSITIONS:
        table = getattr(decoder, name, None)
        if isinstance(table, nn.Embedding):
            return table.num_embeddings - int(getattr(table, "offset", 0))
    return None


def _find_decoder(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    return decoder if isinstance(decoder, nn.Module) else None


def _decoder(model: nn.Module) -> nn.Module:
    decoder = _find_decoder(model)
    if decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers causal language model "
            "(it has no get_decoder()); pass the model that AutoModelForCausalLM returns"
        )
    return decoder


def _child(parent: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        child = getattr(parent, name, None)
        if isinstance(child, nn.Module):
            return child
    found = ", ".join(name for name, _ in parent.named_children()) or "no children"
    raise UnsupportedModelError(
        f"{what}: {type(parent).__name__} has none of {', '.join(names)} (it has {found})"
    )
