"""A model whose layers are on several devices is one graph: all numbers are those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from softtrace import DensityLoss, attach, density_curve, edge_importance
from softtrace.errors import UnsupportedModelError
from softtrace.evaluation.measure import LISTS, measure
from softtrace.graph import attention_maps
from softtrace.metrics.readings import readings
from tests.support.fake_devices import fake_devices, on_cpu
from tests.support.tiny import tiny_model, tiny_prompt

IDS = tiny_prompt(7, batch=2)


def spread(model: Any, first: str, second: str) -> Any:
    """The first layer beside the embedding; the others, the final norm and the head elsewhere."""
    layers = {
        f"model.layers.{at}": second if at else first for at in range(len(model.model.layers))
    }
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second}
    return dispatch_model(model, {**ends, **layers, "lm_head": second}, main_device=first)


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
    found = measure(
        model, on_cpu(ids), min_context=4, batch_size=2, extra_blocks=0, progress=lambda _: None
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


@pytest.mark.thorough
def test_numbers_are_those_of_one_device() -> None:
    found: list[dict[str, list[Tensor]]] = []
    with fake_devices() as (first, second):
        for other in (second, first):
            model = spread(tiny_model("llama"), first, other)
            assert {str(each.device) for each in model.parameters()} == {first, other}
            read = {name: of(model, IDS.to(first)) for name, of in READ.items()}
            found.append({name: [on_cpu(v) for v in values] for name, values in read.items()})
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5, equal_nan=True)


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
