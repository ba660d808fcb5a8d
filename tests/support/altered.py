"""Tiny models of which something was altered: most are no sum of their edges any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
)

from tests.support.tiny import COMMON, tiny_model


class Odd(LlamaDecoderLayer):
    """A Llama layer with a factor on each of its four edges."""

    factors = (1.0, 1.0, 1.0, 1.0)
    calls = 1

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        stream, attention, middle, mlp = self.factors
        for _ in range(self.calls):
            normed = self.input_layernorm(hidden_states)
            mixed = self.self_attn(hidden_states=normed, **options)[0]
            hidden_states = stream * hidden_states + attention * mixed
            added = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = middle * hidden_states + mlp * added
        return hidden_states


class Mixing(nn.Module):
    """An MLP in which a token sees the one before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        before = torch.cat((hidden_states[:, :1], hidden_states[:, :-1]), dim=1)
        return self.inner(hidden_states + 0.01 * before)  # type: ignore[no-any-return]


class TwoResults(nn.Module):
    """An MLP that returns its router's logits too, as mixtures of experts do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(hidden_states), hidden_states[..., :1]


class TakesFirst(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **options)[0]
        mlp: Any = self.mlp
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))[0]  # type: ignore[no-any-return]


def two_results(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp = TwoResults(layer.mlp)
    layer.__class__ = TakesFirst


def mixing_mlp(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp = Mixing(layer.mlp)


def odd_layer(*factors: float, calls: int = 1) -> nn.Module:
    model = tiny_model("llama")
    layer: Any = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.__class__ = Odd
    layer.factors, layer.calls = factors, calls
    return model


class Skips(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states


class NoMLP(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **options)[0]
        self.post_attention_layernorm(hidden_states)
        return hidden_states


class OwnAttention(nn.Module):
    """Does not look its function up in transformers' interface."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.v_proj, self.o_proj = inner.v_proj, inner.o_proj
        self.groups = inner.num_key_value_groups

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        value = self.v_proj(hidden_states).unflatten(-1, (2, -1))
        return self.o_proj(value.repeat_interleave(self.groups, 2).flatten(2)), None


class Amplified(transformers.LlamaForCausalLM):
    """Does something to the logits after the head."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.tanh()
        return output


class NormSquared(nn.Module):
    """No scale a token times a weight: not linearisable."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.abs()


def changed(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    """Builds a tiny Llama of which ``change`` alters something."""

    def build() -> nn.Module:
        model = tiny_model("llama")
        change(model)
        return model

    return build


def retype(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return changed(lambda model: setattr(model.model.layers[1], "__class__", kind))


def replace_projection(make: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def change(model: Any) -> None:
        attention = model.model.layers[2].self_attn
        attention.o_proj = make(attention.o_proj)

    return changed(change)


def own_attention(model: Any) -> None:
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)


def gated_heads(model: Any) -> None:
    """The heads are gated between the mix and the projection, as in AFMoE and Qwen3-Next."""
    attention = model.model.layers[2].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: args[0].sigmoid() * args[0])


def layer_twice(model: Any) -> None:
    model.model.layers[2] = model.model.layers[1]


def mlp_twice(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[1].mlp


def other_norm(model: Any) -> None:
    model.model.norm = NormSquared()


def built(stem: str, kind: str = "ForCausalLM", **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 48, **config}
        return getattr(transformers, stem + kind)(  # type: ignore[no-any-return]
            getattr(transformers, f"{stem}Config")(**settings)
        ).eval()

    return build


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return built("Llama")()


def not_finite(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
