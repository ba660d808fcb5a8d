"""Adapters and parametrisations: the projection that counts is the one that is applied."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from transformers import PreTrainedModel

import softtrace
from softtrace.anatomy import anatomy
from softtrace.errors import UnsupportedModelError
from softtrace.graph.edges import EdgeImportance
from softtrace.lightning import DensityPenalty
from tests.support.fitting import Tuner, batches
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import tiny

with warnings.catch_warnings():  # of its own import
    warnings.simplefilter("ignore")
    peft = importlib.import_module("peft")

IDS = tiny_prompt(7, batch=2)
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gemma2": ["q_proj", "o_proj", "up_proj"],  # a norm follows the projection
    "cohere": ["k_proj", "o_proj"],  # parallel
    "bloom": ["query_key_value", "dense"],  # its projection is where the residual is added
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}


def base(family: str) -> PreTrainedModel:
    return tiny_model(family) if family in ("llama", "gpt2") else tiny(family)


def settings(family: str, **options: Any) -> Any:
    fan_in_fan_out = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return peft.LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.3,
        target_modules=TARGETS[family],
        task_type="CAUSAL_LM",
        **fan_in_fan_out,
        **options,
    )


def redraw(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """PEFT begins with a delta of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key and f".{name}." in key:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def adapted(family: str, **options: Any) -> Any:
    model = peft.get_peft_model(base(family), settings(family, **options))
    redraw(model)
    return model


def importance_of(model: nn.Module) -> EdgeImportance:
    with torch.no_grad():
        return softtrace.edge_importance(model, IDS)


def assert_same(found: EdgeImportance, expected: EdgeImportance) -> None:
    for one, other in zip(found.layers, expected.layers, strict=True):
        for part, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(part, wanted, atol=2e-6, rtol=1e-4)


def differ(one: EdgeImportance, other: EdgeImportance) -> bool:
    return bool((one.layers[-1].attention - other.layers[-1].attention).abs().max() > 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_importances_are_those_of_the_merged_model(family: str, kind: str) -> None:
    model = adapted(family, **KINDS[kind]).train()  # its dropout is off in our runs
    found = importance_of(model)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert_same(found, importance_of(merged))
    assert differ(found, importance_of(base(family)))
    curves = [softtrace.density_curve(each, IDS, thresholds=[0.1]) for each in (model, merged)]
    torch.testing.assert_close(
        curves[0].total_variation, curves[1].total_variation, atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_gradients_reach_adapter_weights_only(family: str, kind: str) -> None:
    model = adapted(family, **KINDS[kind])
    penalty = softtrace.DensityLoss(
        model, masks="soft", attention="recomputed", share=1.0, easy_quantile=1.0, family="sparse"
    )
    penalty(IDS, step=0).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in reached)
    assert len(reached) >= 2 * 3 * 2


def test_merged_unmerged_switched_and_disabled_adapters() -> None:
    model = adapted("llama")
    model.add_adapter("other", settings("llama"))
    redraw(model, "other", seed=1)
    first = importance_of(model)
    handle = softtrace.attach(model)
    model.merge_adapter()
    assert_same(importance_of(model), first)
    model.unmerge_adapter()
    assert_same(importance_of(model), first)
    model.set_adapter("other")
    second = importance_of(model)
    assert differ(first, second)
    expected = copy.deepcopy(model).merge_and_unload()
    assert_same(second, importance_of(expected))
    with model.disable_adapter():
        assert_same(importance_of(model), importance_of(tiny_model("llama")))
    model.set_adapter("default")
    assert_same(importance_of(model), first)
    assert softtrace.attach(model) is handle  # nothing had to be proven anew


def test_attaching_before_and_after_get_peft_model() -> None:
    model = tiny_model("llama")
    before = softtrace.attach(model)
    penalty = softtrace.DensityLoss(model, share=1.0)
    plain = importance_of(model)
    wrapped = peft.get_peft_model(model, settings("llama"))
    redraw(wrapped)
    assert softtrace.attach(wrapped) is not before
    assert softtrace.attach(wrapped) is softtrace.attach(model)
    assert differ(plain, importance_of(wrapped))
    penalty(IDS, step=0).loss.backward()  # made before, works after
    assert any(p.grad is not None for n, p in wrapped.named_parameters() if "lora" in n)
    assert all(p.grad is None for n, p in wrapped.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_before_the_tokens_are_refused(kind: str) -> None:
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="PEFT adapter default adds virtual tokens"):
        softtrace.attach(model)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        Trainer(
            max_steps=1,
            callbacks=[DensityPenalty()],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Tuner(model=model), batches())


def test_attention_that_is_trained_beside_adapters() -> None:
    """PEFT's wrapper runs one of several modules, which ask for attention in their own name."""
    config = peft.LoraConfig(
        target_modules=["up_proj"], modules_to_save=["self_attn"], init_lora_weights=False
    )
    model: Any = peft.get_peft_model(base("llama"), config)
    redraw(model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "modules_to_save" in key:
                weight.mul_(1.5)
    for _ in range(2):
        found = importance_of(model)
        assert_same(found, importance_of(copy.deepcopy(model).merge_and_unload()))
        with model.disable_adapter():
            assert_same(importance_of(model), importance_of(base("llama")))
    assert differ(found, importance_of(base("llama")))


NORMS = {
    "llama": ["post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_f"],  # centred, with a bias
    "gemma2": ["post_attention_layernorm", "norm"],  # one follows the projection
    "cohere": ["norm"],  # folded into the projection of the last layer, which is parallel
}


@pytest.mark.parametrize("kind", ["LNTuningConfig", "LoraConfig"])
@pytest.mark.parametrize("family", NORMS)
def test_norms_that_are_trained_beside_adapters(family: str, kind: str) -> None:
    """PEFT puts a wrapper around a norm, which runs one of several as adapters are switched."""
    config = settings(family, modules_to_save=NORMS[family])
    if kind == "LNTuningConfig":
        config = peft.LNTuningConfig(target_modules=NORMS[family], task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT's own, of norms that it does not know
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base(family), config)
        model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "modules_to_save" in key or "ln_tuning_layers" in key:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    found = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found[name] = importance_of(model)
        assert_same(found[name], importance_of(copy.deepcopy(model).merge_and_unload()))
        with model.disable_adapter():
            assert_same(importance_of(model), importance_of(base(family)))
    assert differ(found["default"], found["other"])
    model.merge_adapter()
    assert_same(importance_of(model), found["default"])


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("LoraConfig", {"alora_invocation_tokens": [5]}, "default is an activated LoRA, which"),
        ("LilyConfig", {"r": 4}, "default is a Lily adapter, whose weights follow from all tokens"),
    ],
)
def test_adapters_that_depend_on_the_tokens_are_refused(
    kind: str, options: dict[str, Any], found: str
) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=["o_proj"], **options)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match=found):
        softtrace.edge_importance(model, IDS)
    with pytest.raises(UnsupportedModelError, match=found):
        softtrace.DensityLoss(model)


def test_lightning_trains_adapters_with_the_penalty() -> None:
    model = adapted("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = copy.deepcopy(model)
    for each, callbacks in ((model, [DensityPenalty(strength=5.0, share=1.0)]), (plain, [])):
        torch.manual_seed(0)
        Trainer(
            max_steps=3,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Tuner(model=each), batches())
    other = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        if "lora" in name:
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])
    assert any(not torch.equal(p, other[n]) for n, p in model.named_parameters())


def assert_written_out(model: Any, change: Callable[[Any], None]) -> None:
    """A changed model has the importances of a plain one with its weights written out."""
    config = type(model.config)(**model.config.to_dict())
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        change(model)
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name)(torch.eye(module.in_features)).T)
    assert type(model.model.layers[0].self_attn.o_proj.weight) is not nn.Parameter
    assert_same(importance_of(model), importance_of(plain))


def weight_normed(model: Any) -> None:
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)
        with torch.no_grad():
            layer.self_attn.o_proj.parametrizations.weight.original0.mul_(1.7)


def test_weights_behind_a_parametrisation() -> None:
    assert_written_out(tiny("llama"), weight_normed)


def test_a_bias_does_not_round_the_weights_of_half_precision_away() -> None:
    """A projection that is run on the identity gives weight and bias in one sum."""
    model: Any = tiny_model("gpt2", dtype=torch.bfloat16)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_proj.weight.mul_(0.2)
            layer.attn.c_proj.bias.copy_(3 * torch.randn(32, generator=draws))
    weight = model.transformer.h[0].attn.c_proj.weight.detach().float()
    wrapped = peft.get_peft_model(model, settings("gpt2"))
    taken = softtrace.attach(wrapped).anatomy
    found = taken.output_weight(0).flatten(0, 1).float()
    assert (found - weight).abs().mean() < 2e-3 * weight.abs().mean()
    first, second = taken.output_weight(1), taken.output_weight(2)
    assert not torch.equal(first, second)


def test_the_probe_of_adapted_projections_is_shared_by_the_layers() -> None:
    """What a backward pass keeps of it is one matrix in all; inference mode does no harm."""
    model = adapted("llama")
    anatomy._probe.cache_clear()
    with torch.inference_mode():
        softtrace.edge_importance(model, IDS)
    softtrace.DensityLoss(model, masks="soft", share=1.0)(IDS, step=0).loss.backward()
    info = anatomy._probe.cache_info()
    assert (info.misses, info.currsize) == (1, 1)
    assert info.hits >= 5
