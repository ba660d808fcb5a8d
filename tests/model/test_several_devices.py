"""A model whose layers are on several devices is one graph: all numbers are those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from softtrace import DensityLoss, attach, density_curve, edge_importance
from softtrace.cli.evaluate import evaluate
from softtrace.data.text_source import TextSource
from softtrace.errors import UnsupportedModelError
from softtrace.evaluation.measure import LISTS, measure
from softtrace.evaluation.run_options import RunOptions
from softtrace.graph import attention_maps
from softtrace.metrics.readings import readings
from softtrace.model.devices import device_map_options
from softtrace.model.loading import load_model
from tests.support.corpus import write_model, write_tree
from tests.support.fake_devices import fake_devices, on_cpu, spread
from tests.support.numbers import in_order
from tests.support.skips import two_gpus
from tests.support.tiny import tiny_model, tiny_prompt

IDS = tiny_prompt(7, batch=2)


def importances(model: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = edge_importance(model, ids)
    return [part for layer in found.layers for part in layer] + [*found.visible]


def curve(model: Any, ids: Tensor) -> list[Tensor]:
    found = density_curve(model, ids, positions=[-1, -3], thresholds=[0.3, 0.03], nucleus=True)
    assert found.nucleus is not None
    return [found.size, found.total_variation, found.nucleus]


def metrics(model: Any, ids: Tensor) -> list[Tensor]:
    found = readings(model, ids, attention="recomputed")
    return [found["curve"].size, found["curve"].total_variation, found["exits"]]


def row_by_row(model: Any, ids: Tensor) -> list[Tensor]:
    with patch.object(attention_maps, "HELD_ELEMENTS", 0):
        return metrics(model, ids)


def evaluation(model: Any, ids: Tensor) -> list[Tensor]:
    blocks = on_cpu(ids).cpu()
    found = measure(
        model, blocks, min_context=4, batch_size=2, extra_blocks=0, progress=lambda _: None
    )
    return [torch.cat(getattr(found, name), -1) for name in LISTS if name != "nucleus"]


def step(model: Any, ids: Tensor) -> list[Tensor]:
    """Term and gradients. Draws, and how often there are any, are those of an accelerator."""
    density = DensityLoss(model.train(), every=1, exits=0.6, exit_tokens=0.5, cuda_graph=False)
    with density.watching(step=0) as watched:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    term = density(ids, labels=ids, step=0, watched=watched)
    (loss + term.loss).backward()
    return [term.loss.detach(), *(weight.grad for weight in model.parameters())]


READ: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "importances": importances, "curve": curve, "metrics": metrics, "evaluation": evaluation,
    "maps made row by row": row_by_row, "step": step,
}  # fmt: skip


def numbers(first: str, second: str) -> dict[str, list[Tensor]]:
    """All that is read of a model on two devices, on the CPU."""
    model = spread(tiny_model("llama"), first, second)
    assert {str(each.device) for each in model.parameters()} == {first, second}
    read = {name: of(model, IDS.to(first)) for name, of in READ.items()}
    return {name: [on_cpu(value).cpu() for value in values] for name, values in read.items()}


@pytest.mark.thorough
def test_numbers_are_those_of_one_device() -> None:
    with fake_devices() as (first, second):
        found = [numbers(first, other) for other in (second, first)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5, equal_nan=True)


@two_gpus
def test_numbers_of_two_gpus_are_those_of_one() -> None:
    torch.testing.assert_close(
        numbers("cuda:0", "cuda:1"), numbers("cuda:0", "cuda:0"),
        atol=1e-6, rtol=1e-5, equal_nan=True,
    )  # fmt: skip


@two_gpus
def test_evaluate_with_a_device_map_over_two_gpus_equals_without(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    text = TextSource(str(write_tree(tmp_path / "text")))
    limits = {"0": "120KB", "1": "400KB"}  # for 159 KB
    gpu = torch.device("cuda", 0)
    mapped = load_model(model, **device_map_options("auto", limits, gpu, str(tmp_path / "rest")))
    assert {each.device for each in mapped.parameters()} == {gpu, torch.device("cuda", 1)}
    options: dict[str, Any] = {
        "block_size": 8, "blocks": 3, "batch_size": 2, "extra_blocks": 1,
        "run": RunOptions(device="cuda"),
    }  # fmt: skip
    wanted = evaluate(model, text, str(tmp_path / "whole"), **options)
    more: dict[str, Any] = {"device_map": "auto", "max_memory": limits}
    found = evaluate(model, text, str(tmp_path / "mapped"), **more, **options)
    for name in ("created", "command", "seconds"):
        found.pop(name), wanted.pop(name)
    assert len(in_order(found)) > 500
    assert in_order(found) == pytest.approx(in_order(wanted), abs=1e-5)


def test_a_layer_in_two_places_is_refused() -> None:
    with fake_devices() as (first, second):
        model: Any = tiny_model("llama")
        places = {
            name: second if name.startswith("model.layers.1.mlp") else first
            for name, module in model.named_modules()
            if not any(module.children())
        }
        dispatch_model(model, places, main_device=first)
        with pytest.raises(UnsupportedModelError, match=r"does not run .*one device"):
            attach(model)


def test_two_devices_do_not_meet_by_accident() -> None:
    with fake_devices() as (first, second):
        one, other = torch.ones(2, device=first), torch.ones(2, device=second)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            one + other
        assert torch.equal(one + other.to(first), 2 * one)
