"""Half precision and autocast in every pattern: near float32, never NaN, with stated tolerances."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import softtrace
from softtrace.errors import UnsupportedModelError
from softtrace.graph.edges import EdgeImportance
from tests.support.zoo import VERIFIED, tiny

pytestmark = pytest.mark.thorough

#: one case a pattern and a way to reach attention
PATTERNS = (
    *("llama", "gpt2", "olmo2", "gemma2", "glm4", "cohere", "gpt_neox", "gptj", "bloom", "mpt"),
    *("falcon, new layout", "granite", "hyperclovax", "opt", "mixtral", "gpt_oss", "qwen2"),
)
#: largest difference of an importance (a share of 1) from float32: mean, and any edge
SHARES = {torch.bfloat16: (2e-3, 0.1), torch.float16: (3e-4, 0.02)}
IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0


def pair(case: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same rounded weights in float32 and in ``dtype``."""
    kind, changes = VERIFIED[case]
    exact = tiny(kind, dtype=dtype, **changes).float()
    return exact, copy.deepcopy(exact).to(dtype)


def differences(one: EdgeImportance, other: EdgeImportance) -> Tensor:
    return torch.cat(
        [
            (a.float() - b.float()).abs().flatten()
            for x, y in zip(one.layers, other.layers, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", SHARES, ids=str)
@pytest.mark.parametrize("case", PATTERNS)
def test_half_precision_is_near_float32(case: str, dtype: torch.dtype) -> None:
    exact, half = pair(case, dtype)
    found, expected = (softtrace.edge_importance(each, IDS, MASK) for each in (half, exact))
    for layer in found.layers:
        assert {part.dtype for part in layer} == {torch.float32}
        assert all(part.isfinite().all() for part in layer)
    mean, largest = SHARES[dtype]
    if case in ("mixtral", "gpt_oss"):  # rounding sends a token to another expert
        mean, largest = 3 * mean, 1.0
    difference = differences(found, expected)
    assert difference.mean() < mean
    assert difference.max() < largest
    curves = [softtrace.density_curve(each, IDS, MASK) for each in (half, exact)]
    areas = [curve.area()[MASK.bool()] for curve in curves]
    assert areas[0].isfinite().all()
    assert (areas[0] - areas[1]).abs().mean() < (0.03 if dtype == torch.bfloat16 else 0.015)


@pytest.mark.parametrize("case", PATTERNS)
def test_autocast_is_near_float32(case: str) -> None:
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes)
    with torch.no_grad():
        exact = softtrace.edge_importance(model, IDS, MASK)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = softtrace.edge_importance(model, IDS, MASK)
    assert {part.dtype for layer in mixed.layers for part in layer} == {torch.float32}
    assert differences(mixed, exact).mean() < (6e-3 if case in ("mixtral", "gpt_oss") else 2e-3)
    penalty = softtrace.DensityLoss(model, share=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = penalty(IDS, MASK, step=0)
    assert term.loss.dtype == torch.float32
    term.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def overflowing(case: str, dtype: torch.dtype) -> Any:
    """Scores beyond 65,504 before they are scaled, and a residual stream of thousands.

    Qwen 2 and 2.5 are like that: biases of keys in the hundreds, a few huge activations.
    """
    kind, changes = VERIFIED[case]
    model: Any = tiny(kind, dtype=dtype, **changes).float()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20_000.0
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias[:8] += 150.0
            layer.self_attn.k_proj.bias[:8] += 150.0
    return model


@torch.no_grad()
def test_large_activations_of_float16_give_no_nan() -> None:
    exact = overflowing("qwen2", torch.float16)
    half = copy.deepcopy(exact).half()
    x = exact.model.layers[0].input_layernorm(exact.model.embed_tokens(IDS))
    attention = exact.model.layers[0].self_attn
    scores = attention.q_proj(x)[..., :8] @ attention.k_proj(x)[..., :8].transpose(-1, -2)
    assert scores.max() > torch.finfo(torch.float16).max  # without care this is infinite
    assert exact.model.embed_tokens(IDS).abs().sum(-1).max() > 2e4
    plain = half(input_ids=IDS, attention_mask=MASK).logits
    assert plain[MASK.bool()].isfinite().all()
    found, expected = (softtrace.edge_importance(each, IDS, MASK) for each in (half, exact))
    assert all(part.isfinite().all() for layer in found.layers for part in layer)
    assert differences(found, expected).mean() < 1e-3
    curve = softtrace.density_curve(half, IDS, MASK)
    assert curve.total_variation[:, MASK.bool()].isfinite().all()
    with torch.enable_grad():
        softtrace.DensityLoss(half, share=1.0, masks="soft")(IDS, MASK, step=0).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["llama", "granite", "cohere"])
def test_a_node_without_edges_is_zero_also_in_half_precision(case: str, dtype: torch.dtype) -> None:
    """residual + (output - residual) rounds; what a norm reads must be zero all the same."""
    _, half = pair(case, dtype)
    instrument = softtrace.attach(half)
    recording = instrument.record(instrument.batch(IDS))
    none = [layer.map(torch.zeros_like) for layer in recording.importance.layers]
    seen: list[Tensor] = []
    readers = {module for layer in instrument.anatomy.layers for module in layer.middle}
    readers |= {instrument.anatomy.readout.norm.module}
    handles = [
        each.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for each in readers
    ]
    own = instrument.masked_logits(recording.batch, none, recording.attention)
    for handle in handles:
        handle.remove()
    assert own.isfinite().all()
    assert not seen[-1].any()


@torch.no_grad()
@pytest.mark.parametrize("case", ["falcon, one key head", "falcon, new layout", "gptj", "llama"])
def test_masked_residuals_leak_nothing_under_autocast(case: str) -> None:
    """Falcon adds two half-precision outputs in place, whatever its residual stream is."""
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes)
    instrument = softtrace.attach(model)
    ids = IDS[:1]
    other = (ids + 7) % 64 + 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = instrument.record(instrument.batch(ids))
        masks = [layer.map(torch.ones_like) for layer in recording.importance.layers]
        masks[1] = masks[1].map(torch.zeros_like)
        logits = [
            instrument.masked_logits(instrument.batch(each), masks, recording.attention)
            for each in (ids, other)
        ]
    assert torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "olmoe", "glm4_moe"])
def test_a_token_that_rounding_sends_to_another_expert_refuses_no_model(case: str) -> None:
    """In bfloat16 transformers' own kernels differ by as much, with some of these weights."""
    kind, changes = VERIFIED[case]
    for seed in range(6):
        model = tiny(kind, dtype=torch.bfloat16, **{**changes, "num_hidden_layers": 6})
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
        assert softtrace.attach(model).anatomy.pattern == "sequential pre-norm"


@torch.no_grad()
@pytest.mark.parametrize("case", ["gpt_neox", "cohere", "gemma4_text, experts"])
def test_sub_blocks_of_mixed_precision_under_autocast(case: str) -> None:
    """A projection that is kept in float32 beside an MLP in bfloat16 loses no part of the node."""
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes)
    instrument = softtrace.attach(model)
    for modules in instrument.anatomy.layers:
        plain = modules.projection.forward

        def exact(x: Tensor, plain: Any = plain) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return plain(x.float())  # type: ignore[no-any-return]

        modules.projection.forward = exact  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = instrument.record(instrument.batch(IDS[:1]))
        ones = [layer.map(torch.ones_like) for layer in recording.importance.layers]
        again = instrument.masked_logits(recording.batch, ones, recording.attention)
    largest = recording.logits.abs().max()
    assert (again - recording.logits).abs().max() < 0.05 * largest


def test_a_norm_that_changes_little_makes_no_second_reader_of_a_node() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        rows = model.model.embed_tokens.weight
        rows.div_(rows.pow(2).mean(-1, keepdim=True).sqrt())
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
            layer.post_attention_layernorm.weight.fill_(1)
    instrument = softtrace.attach(model.bfloat16())
    for modules, layer in zip(instrument.anatomy.layers, model.model.layers, strict=True):
        assert modules.middle == (layer.post_attention_layernorm,)


def test_weights_of_two_types_are_named_where_the_model_runs_under_autocast_alone() -> None:
    model = tiny("llama").to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS[:1])
        with pytest.raises(UnsupportedModelError, match=r"are of torch.bfloat16 and torch.float32"):
            softtrace.attach(model)
    assert softtrace.attach(model.to(torch.bfloat16))
