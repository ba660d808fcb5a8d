"""Offloaded models: weights that are on ``meta`` outside their module's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import PreTrainedModel

import softtrace
from softtrace.cli.evaluate import evaluate
from softtrace.data.text_source import TextSource
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.evaluation.processes import Processes
from softtrace.evaluation.provenance import hardware
from softtrace.model.devices import check_device_map, device_map_options
from softtrace.model.loading import load_model
from tests.support.calls import CPU
from tests.support.corpus import write_model, write_tree
from tests.support.numbers import in_order
from tests.support.tiny import tiny_model, tiny_prompt

OPTIONS: dict[str, Any] = {
    "block_size": 8, "blocks": 3, "batch_size": 2, "extra_blocks": 1, "run": CPU,
}  # fmt: skip


def on_disk(model: PreTrainedModel, folder: Path) -> nn.Module:
    layers = {f"model.layers.{at}": "disk" for at in range(1, len(model.model.layers))}
    rest = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    found: nn.Module = dispatch_model(
        model, {**rest, **layers}, main_device="cpu", offload_dir=str(folder)
    )
    return found


WAYS: dict[str, Callable[[PreTrainedModel, Path], nn.Module]] = {
    "memory": lambda model, _: cpu_offload(model, "cpu"),
    "disk": lambda model, folder: disk_offload(model, str(folder), "cpu"),
    "some layers on disk": on_disk,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_is_the_whole_one(tmp_path: Path, way: str) -> None:
    whole = tiny_model("llama", attention_bias=True)
    model = WAYS[way](tiny_model("llama", attention_bias=True), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    ids = tiny_prompt(7, batch=2)
    with torch.no_grad():
        found, wanted = (softtrace.edge_importance(each, ids) for each in (model, whole))
    for one, other in zip(found.layers, wanted.layers, strict=True):
        for part, expected in zip(one, other, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-5)
    curve, expected_curve = (softtrace.density_curve(each, ids) for each in (model, whole))
    torch.testing.assert_close(curve.total_variation, expected_curve.total_variation)
    assert any(parameter.is_meta for parameter in model.parameters())  # nothing was left behind


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    ids = tiny_prompt(7, batch=2)
    found, wanted = (
        softtrace.density_curve(model, ids)
        for model in (cpu_offload(tiny_model(family), "cpu"), tiny_model(family))
    )
    torch.testing.assert_close(found.total_variation, wanted.total_variation)


@pytest.mark.thorough
def test_evaluate_with_a_device_map_equals_without(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    text = TextSource(str(write_tree(tmp_path / "text")))
    limits = {"cpu": "1KB"}  # of 159 KB, so the embedding is offloaded too
    mapped = load_model(
        model, **device_map_options("auto", limits, torch.device("cpu"), str(tmp_path / "offload"))
    )
    assert any(parameter.is_meta for parameter in mapped.parameters())
    wanted = evaluate(model, text, str(tmp_path / "whole"), **OPTIONS)
    found = evaluate(
        model, text, str(tmp_path / "mapped"), device_map="auto", max_memory=limits, **OPTIONS
    )
    for name in ("created", "command", "seconds"):
        found.pop(name), wanted.pop(name)
    assert len(in_order(found)) > 500
    assert in_order(found) == pytest.approx(in_order(wanted), abs=1e-6)


def test_weights_that_nothing_brings_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.\w+ and 2 other mod"):
        softtrace.attach(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("balanced", None, 1), "device_map: found 'balanced', allowed are None and 'auto'"),
        ((None, {"cpu": "1GB"}, 1), "max_memory: found it without device_map"),
        (("auto", None, 2), "device_map: found 'auto' with 2 processes"),
    ],
)
def test_maps_that_are_refused(words: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_device_map(*words)


def test_all_accelerators_may_hold_weights_unless_the_cpu_computes() -> None:
    gpu = torch.device("cuda", 1)
    limits = {"0": "2GB", "1": "2GB", "cpu": "9GB"}
    found = device_map_options("auto", limits, gpu, "folder")
    assert found["max_memory"] == {0: "2GB", 1: "2GB", "cpu": "9GB"}
    with pytest.raises(InvalidInputError, match="max_memory: found 0, 1, allowed is cpu"):
        device_map_options("auto", limits, torch.device("cpu"), "folder")
    assert device_map_options(None, None, gpu, "folder") == {}


@pytest.mark.parametrize(
    ("found", "taken"),
    [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")],
)
def test_auto_is_any_accelerator_that_has_float64(
    found: str | None, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert Processes("auto").device == torch.device(taken)
    assert Processes("cpu").device == torch.device("cpu")


def test_an_accelerator_without_a_name_is_not_called_a_processor() -> None:
    assert "CPU" in hardware(torch.device("cpu"))
    assert hardware(torch.device("mps")) == "mps"
