"""Ways to train real models take steps on tiny ones of both families, and weigh what they say."""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import pytest
import torch

from recipes.benchmarks.comparison import on_real_models
from recipes.benchmarks.comparison.peer_losses import ExitDistillation, LayerSkip
from recipes.benchmarks.comparison.real_ways import (
    PEERS,
    WAYS,
    RealConnectivity,
    RealExitDistillation,
    RealLayerSkip,
)
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import tiny

STEPS = 2


def model_of(family: str) -> Any:
    """Random weights, with modules named as those of SmolLM2 or of Gemma 3."""
    if family == "llama":
        return tiny_model("llama", num_hidden_layers=4, attn_implementation="sdpa").train()
    return tiny("gemma3_text").train()


def trained(way: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``train`` says of a few steps of a way."""
    monkeypatch.setattr(on_real_models, "ROWS", 2)
    tokens = {"train": tiny_prompt(16, batch=4), "held_out": tiny_prompt(16, batch=2)}
    args = argparse.Namespace(lora=False, steps=STEPS)
    plain = dict.fromkeys(range(1, STEPS + 1), 4.2)
    (strength,) = WAYS[way].strengths
    return on_real_models.train(model, WAYS[way](model, strength, 0, plain), tokens, args, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", PEERS)
def test_every_peer_trains_both_families(
    way: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    losses = trained(way, model, monkeypatch)["held_out_losses"]
    assert list(losses) == [1, 2]
    assert all(map(math.isfinite, losses.values()))
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(("real", "paper"), [
    (RealLayerSkip, LayerSkip), (RealExitDistillation, ExitDistillation),
])  # fmt: skip
def test_row_by_row_is_the_same_loss(real: Any, paper: Any) -> None:
    ids, found = tiny_prompt(12, batch=3), []
    for method in (real, paper):
        model = model_of("llama")
        loss, _ = method(model, 0.5)(ids, 2)
        loss.backward()
        found.append((loss.detach(), model.model.layers[1].mlp.up_proj.weight.grad))
    torch.testing.assert_close(*found)


def test_without_dropout_layers_stay() -> None:
    ids = tiny_prompt(12, batch=3)
    way = WAYS["layerskip, 0.05, no dropout"]
    model = model_of("llama")
    _, task = way(model, 0.05)(ids, 0)
    torch.testing.assert_close(task, model(input_ids=ids, labels=ids).loss)


def test_the_weight_of_connectivity_follows_the_held_out_loss() -> None:
    method = RealConnectivity(model_of("llama"), 0.01, 0, {40: 2.0, 80: 2.0, 120: 2.0, 160: 1.0})
    weights = [math.log(method.weight(torch.tensor(9.0), 0))]
    for step, loss in ((40, 2.0), (80, 2.01), (120, 2.02), (160, 2.0)):
        method.measured(step, loss)
        weights.append(math.log(method.weight(torch.tensor(9.0), step)))
    # nothing spent; half of it, and all of it next time; all of it and half more; far too much
    changes = [after - before for before, after in itertools.pairwise(weights)]
    assert changes == pytest.approx([0.5, 0.0, -0.25, -1.0])


def test_connectivity_needs_a_plain_run() -> None:
    with pytest.raises(ValueError, match="losses of the paired plain run"):
        RealConnectivity(model_of("llama"), 0.01)
