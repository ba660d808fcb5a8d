"""Rewriting a model's weights without changing its function leaves every measure alone, but one.

A penalty on sizes could be gamed by scaling; what is reported cannot: importances are shares of a
node, and a factor that one matrix gains and its reader loses cancels. The L1 norm, which the paper
measures edges by, does depend on the basis of the residual stream: a rotation of it, which an
RMS-normed model cannot tell, moves importances. That is said in recipes/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.density.exits import exit_agreement
from tests.support.tiny import tiny_model, tiny_prompt

IDS = tiny_prompt(12, seed=5, batch=3)


def values_and_output(model: Any, by: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.mul_(by)
        layer.self_attn.o_proj.weight.div_(by)


def queries_and_keys(model: Any, by: float) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(by)
        layer.self_attn.k_proj.weight.div_(by)


def inside_the_mlp(model: Any, by: float) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(by)
        layer.mlp.down_proj.weight.div_(by)


def norms_and_their_readers(model: Any, by: float) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.weight.mul_(by)
        layer.post_attention_layernorm.weight.mul_(by)
        for module in (*(getattr(layer.self_attn, f"{p}_proj") for p in "qkv"),
                       layer.mlp.gate_proj, layer.mlp.up_proj):  # fmt: skip
            module.weight.div_(by)
    model.model.norm.weight.mul_(by)
    model.lm_head.weight.div_(by)


def the_whole_residual_stream(model: Any, by: float) -> None:
    model.model.embed_tokens.weight.mul_(by)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(by)
        layer.mlp.down_proj.weight.mul_(by)


def permutation_of_the_residual_stream(model: Any, by: float) -> None:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(round(by)))
    rewrite_basis(model, torch.eye(32, dtype=torch.float64)[order])


def rewrite_basis(model: Any, rotation: Tensor) -> None:
    """Residual stream x becomes x R; norm weights have to be equal in every channel."""
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ rotation)
    model.lm_head.weight.copy_(model.lm_head.weight @ rotation)
    for layer in model.model.layers:
        readers = [getattr(layer.self_attn, f"{p}_proj") for p in "qkv"]
        for module in (*readers, layer.mlp.gate_proj, layer.mlp.up_proj):
            module.weight.copy_(module.weight @ rotation)
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.copy_(rotation.T @ module.weight)


def model_with_even_norms() -> Any:
    """Norm weights folded into their readers, and next to no epsilon: any scale is the same."""
    model = tiny_model("llama", seed=4, dtype=torch.float64, rms_norm_eps=1e-14)
    with torch.no_grad():
        for layer in model.model.layers:
            readers = [getattr(layer.self_attn, f"{p}_proj") for p in "qkv"]
            for norm, modules in (
                (layer.input_layernorm, readers),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                for module in modules:
                    module.weight.mul_(norm.weight)
                norm.weight.fill_(1.0)
        model.lm_head.weight.mul_(model.model.norm.weight)
        model.model.norm.weight.fill_(1.0)
    return model


@torch.no_grad()
def measured(model: Any) -> dict[str, Tensor]:
    thresholds = (0.4, 0.2, 0.1, 0.05, 0.02)
    curve = softtrace.density_curve(model, IDS, thresholds=thresholds, composition=True)
    instrument = softtrace.attach(model)
    recording = instrument.record(instrument.batch(IDS), keep_hidden=True)
    assert curve.composition is not None
    return {
        "size": curve.size,
        "variation": curve.total_variation,
        "area": curve.area(),
        "size at TV 0.2": curve.size_at(0.2),
        "entropy": curve.entropy,
        "composition": curve.composition,
        "exits": exit_agreement(instrument, recording).double(),
    }


@pytest.mark.parametrize("by", [1 / 7, 30.0])
@pytest.mark.parametrize(
    "rewrite",
    [
        values_and_output, queries_and_keys, inside_the_mlp, norms_and_their_readers,
        the_whole_residual_stream, permutation_of_the_residual_stream,
    ],
)  # fmt: skip
def test_measures_do_not_see_scales(rewrite: Callable[[Any, float], None], by: float) -> None:
    model = model_with_even_norms()
    before = measured(model)
    with torch.no_grad():
        rewrite(model, by)
    after = measured(model)
    for name, values in before.items():
        # Llama's norm computes in float32 whatever the model's dtype.
        torch.testing.assert_close(after[name], values, atol=1e-5, rtol=1e-5, msg=name)


def test_a_rotation_moves_importances_but_neither_predictions_nor_exits() -> None:
    model = model_with_even_norms()
    before = measured(model)
    random = torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        rewrite_basis(model, torch.linalg.qr(random).Q)
    after = measured(model)
    for name in ("entropy", "exits"):
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)
    assert (after["size"] - before["size"]).abs().max() > 0.01
