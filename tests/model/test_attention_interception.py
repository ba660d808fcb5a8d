"""Attention that no interface shows, caught at its softmax: code from anywhere."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import eager_attention_forward

import softtrace
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.model.attention_interface import IMPLEMENTATION, softtrace_attention_active
from softtrace.tracing.attach import attach
from tests.support.state import state
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt
from tests.support.zoo import VERIFIED, redraw, tiny

WAYS = ("sdpa", "causal sdpa", "softmax", "folded")


def causal(length: int, attention_mask: Tensor | None) -> Tensor:
    """``[B, 1, T, S]``: what may be looked at; padding looks at itself."""
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if attention_mask is None:
        return allowed
    return (allowed & attention_mask.bool()[:, None, None]) | torch.eye(length, dtype=torch.bool)


class TheirConfig(PretrainedConfig):
    model_type = "theirs"

    def __init__(self, way: str = "sdpa", **options: Any) -> None:
        self.way = way
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size = 67
        super().__init__(**options)


class TheirAttention(nn.Module):
    """Attention as people write it, in four ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.heads = way, 4
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(x).chunk(3, dim=-1)
        )
        if self.way == "causal sdpa":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "sdpa":
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:
            scores = q @ k.transpose(-1, -2) / 8**0.5
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
            if self.way == "softmax":
                probabilities = self.dropout(scores.softmax(-1))
                mixed = torch.matmul(probabilities, v)
            else:
                folded = scores.reshape(-1, length, length)
                probabilities = self.dropout(
                    functional.softmax(folded, dim=-1, dtype=torch.float32)
                )
                mixed = torch.bmm(probabilities.to(v.dtype), v.reshape(-1, length, 8))
                mixed = mixed.reshape(batch, self.heads, length, 8)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TheirLayer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm_in, self.attend = nn.LayerNorm(32), TheirAttention(way)
        self.norm_mid = nn.LayerNorm(32)
        self.feed = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.attend(self.norm_in(x), allowed)
        return x + self.feed(self.norm_mid(x))  # type: ignore[no-any-return]


class TheirModel(PreTrainedModel):
    """What trust_remote_code loads: a class that transformers does not know."""

    config_class = TheirConfig

    def __init__(self, config: TheirConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(67, 32)
        self.stack = nn.ModuleList([TheirLayer(config.way) for _ in range(2)])
        self.last = nn.LayerNorm(32)
        self.to_vocabulary = nn.Linear(32, 67, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.to_vocabulary

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        allowed = causal(input_ids.shape[1], attention_mask)
        x = self.tokens(input_ids)
        for layer in self.stack:
            x = layer(x, allowed)
        return CausalLMOutput(logits=self.to_vocabulary(self.last(x)))


def theirs(way: str) -> TheirModel:
    model = TheirModel(TheirConfig(way))
    redraw(model)
    return model.float().eval()


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_code_from_elsewhere_is_taken_apart_or_refused(way: str) -> None:
    model = theirs(way)
    if way == "causal sdpa":  # a padded row looks at its padding
        ids, mask = tiny_prompt(6, batch=2), None
    else:
        ids, mask = tiny_prompt(6, batch=2), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    model.train()
    instrument = softtrace.attach(model)
    assert instrument.anatomy.route == "interception"
    assert instrument.anatomy.pattern == "sequential pre-norm"
    recording = instrument.record(instrument.batch(ids, mask))
    model.eval()
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    plain = model(ids, mask).logits
    torch.testing.assert_close(recording.logits[valid], plain[valid], atol=1e-5, rtol=1e-4)
    usual = theirs("softmax")
    expected = softtrace.edge_importance(usual, ids, mask)
    for one, other in zip(recording.importance.layers, expected.layers, strict=True):
        for part, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-3)
    curves = [softtrace.density_curve(each, ids, mask, thresholds=[0.1]) for each in (model, usual)]
    torch.testing.assert_close(*(curve.size for curve in curves), equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_interface_are_reached_through_it(family: str) -> None:
    """Without a mask function of the same name they would fall back to the softmax."""
    assert IMPLEMENTATION in AttentionMaskInterface._global_mapping
    assert softtrace.attach(tiny_model(family)).anatomy.route == "interface"


@pytest.mark.parametrize("way", WAYS)
def test_recomputed_attention_has_gradients_to_queries(way: str) -> None:
    model, ids = theirs(way).train(), tiny_prompt(6, batch=2)
    for attention, reached in (("recomputed", True), ("recorded", False)):
        model.zero_grad()
        softtrace.DensityLoss(model, attention=attention, share=1.0, easy_quantile=1.0)(
            ids, step=0
        ).loss.backward()
        gradient = model.stack[0].attend.qkv.weight.grad
        assert bool(gradient[:32].any()) == reached
        assert gradient[64:].any()


class Sharpened(TheirAttention):
    """The softmax is changed before it meets the values."""

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (e.unflatten(-1, (4, -1)).transpose(1, 2) for e in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2)).masked_fill(~allowed, -1e9).softmax(-1)
        weights = weights * weights
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Summed(TheirAttention):
    """No product of probabilities and values that could be seen."""

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (e.unflatten(-1, (4, -1)).transpose(1, 2) for e in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2)).masked_fill(~allowed, -1e9).softmax(-1)
        mixed = (weights[..., None] * v[:, :, None]).sum(3)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@torch.no_grad()
def test_what_multiplies_the_values_counts() -> None:
    """Probabilities are followed from the softmax to the product, whatever happens on the way."""
    model, ids = theirs("softmax"), tiny_prompt(5)
    for layer in model.stack:
        layer.attend.__class__ = Sharpened
    recording = attach(model).record(attach(model).batch(ids))
    x = model.stack[0].norm_in(model.tokens(ids))
    q, k, _ = (
        e.unflatten(-1, (4, -1)).transpose(1, 2)
        for e in model.stack[0].attend.qkv(x).chunk(3, dim=-1)
    )
    scores = (q @ k.transpose(-1, -2)).masked_fill(~torch.ones(5, 5).bool().tril(), -1e9)
    torch.testing.assert_close(recording.attention[0], scores.softmax(-1) ** 2)
    for layer in model.stack:
        layer.attend.__class__ = Summed
    softtrace.attach(model).detach()
    with pytest.raises(UnsupportedModelError, match=r"a softmax of scores .* no matrix product"):
        softtrace.attach(model)


class Masked(TheirAttention):
    """Masks of fewer dimensions, as ``scaled_dot_product_attention`` allows them."""

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (e.unflatten(-1, (4, -1)).transpose(1, 2) for e in self.qkv(x).chunk(3, dim=-1))
        k, v = k[:, :2], v[:, :2]
        mask = allowed[0, 0]
        if self.way == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("way", ["bool", "float"])
def test_masks_of_two_dimensions_and_grouped_heads(way: str) -> None:
    model, ids = theirs(way), tiny_prompt(5)
    for layer in model.stack:
        layer.attend.__class__ = Masked
    recording = attach(model).record(attach(model).batch(ids))
    torch.testing.assert_close(recording.logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert recording.importance.visible[0][0].equal(torch.ones(5, 5).bool().tril())


@torch.no_grad()
def test_a_model_that_looks_at_its_padding() -> None:
    model, ids = theirs("causal sdpa"), tiny_prompt(6, batch=2)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    curve = softtrace.density_curve(model, ids, mask, thresholds=[1e-9])
    assert curve.total_variation[:, mask.bool()].max() < 1e-5  # every edge is kept
    for measure in (softtrace.edge_importance, softtrace.density_curve):
        with pytest.raises(InvalidInputError, match="padding stands before real tokens"):
            measure(model, ids, mask.flip(1))


class Wrapping(nn.Module):
    """Hands its results out in another way."""

    def __init__(self, inner: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, *args: Any) -> Any:
        return self.wrap(self.inner(*args))


class Unwrapping(TheirModel):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        allowed = causal(input_ids.shape[1], attention_mask)
        x: Any = self.tokens(input_ids)
        for layer in self.stack:
            x = layer(x, allowed)
            x = x["hidden"] if isinstance(x, dict) else x if isinstance(x, Tensor) else x[-1]
        return CausalLMOutput(logits=self.to_vocabulary(self.last(x)))


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"hidden": x},
        lambda x: [x],
        lambda x: (None, x),
        lambda x: (torch.ones(2).long(), x),
    ],
    ids=["mapping", "list", "none first", "ids first"],
)
def test_layers_may_hand_their_output_out_in_any_way(wrap: Any) -> None:
    model, ids = Unwrapping(TheirConfig("softmax")), tiny_prompt(5, batch=2)
    redraw(model)
    model = model.float().eval()
    expected = softtrace.edge_importance(model, ids)
    model.stack = nn.ModuleList([Wrapping(layer, wrap) for layer in model.stack])
    found = softtrace.edge_importance(model, ids)
    assert torch.equal(found.layers[1].attention, expected.layers[1].attention)
    none = [layer.map(torch.zeros_like) for layer in found.layers]
    logits = attach(model).masked_logits(
        attach(model).batch(ids), none, attach(model).record(attach(model).batch(ids)).attention
    )
    assert (logits - logits[:1, :1]).abs().max() < 1e-5


def test_logits_that_are_cut_are_refused() -> None:
    model = theirs("softmax")
    model.tokens = nn.Embedding.from_pretrained(model.tokens.weight[:60].detach())

    def cut(module: nn.Module, args: Any, output: CausalLMOutput) -> CausalLMOutput:
        return CausalLMOutput(logits=output.logits[..., :60])

    model.register_forward_hook(cut)
    with pytest.raises(UnsupportedModelError, match=r"the head gives \(2, 6, 67\), the logits are"):
        softtrace.attach(model)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "bloom"])
def test_models_compiled_in_place_run_as_they_were_written(case: str) -> None:
    ids = tiny_prompt(6)
    expected = softtrace.edge_importance(tiny(case), ids)
    model, other = tiny(case), tiny(case)
    model.compile(backend="eager")
    other.forward = torch.compile(other.forward, backend="eager")
    for each in (model, other):
        found = softtrace.edge_importance(each, ids)
        assert torch.equal(found.layers[1].attention, expected.layers[1].attention)


@pytest.mark.parametrize("case", ["gptj", "bloom", "falcon, sequential, alibi"])
def test_runs_leave_a_model_as_it_was(case: str) -> None:
    kind, changes = VERIFIED[case]
    model, ids = tiny(kind, **changes).train(), tiny_prompt(5, batch=2)
    before = state(model)
    handle = softtrace.attach(model)
    softtrace.density_curve(model, ids, thresholds=[0.1])
    softtrace.DensityLoss(model)(ids, step=0)
    assert state(model) == before
    attention = handle.anatomy.layers[1].attention
    hook = attention.register_forward_hook(lambda *_: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        softtrace.edge_importance(model, ids)
    assert state(model) == before
    hook.remove()
    scores = torch.zeros(1, 1, 2, 2)
    assert torch.equal(scores.softmax(-1), torch.full_like(scores, 0.5))  # no mode is left behind


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "bloom"])
def test_a_kernel_of_the_users_own_is_untouched_and_plays_no_part(case: str) -> None:
    """As with flash attention: a name in the config that our runs do not use."""
    calls = []

    def kernel(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return eager_attention_forward(*args, **options)

    AttentionInterface.register("users_own", kernel)
    AttentionMaskInterface.register("users_own", eager_mask)
    try:
        model: Any = tiny_model(case) if case == "llama" else tiny(case)
        ids = tiny_prompt(6)
        expected = attach(model).record(attach(model).batch(ids)).logits
        model.config._attn_implementation_internal = "users_own"
        softtrace.attach(model).detach()
        found = attach(model).record(attach(model).batch(ids)).logits
        assert (len(calls) > 0) == (case == "llama")  # at attach, the model's own run
        before = len(calls)
        attach(model).record(attach(model).batch(ids))
        assert len(calls) == before
        assert model.config._attn_implementation == "users_own"
        torch.testing.assert_close(found, expected)
    finally:
        AttentionInterface._global_mapping.pop("users_own")
        AttentionMaskInterface._global_mapping.pop("users_own")


def test_nothing_holds_a_run_that_ended() -> None:
    listener: Any = type("Listener", (), {})()
    with suppress(KeyError), softtrace_attention_active([], listener):
        raise KeyError
    held = weakref.ref(listener)
    del listener
    gc.collect()
    assert held() is None
