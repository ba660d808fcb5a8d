"""Masked runs read at an exit: right values, no layer too many, nobody else's hooks hurt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.graph.masks import hard_masks
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from tests.loss.test_density_loss import exits
from tests.support import oracle
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt

DEPTHS = torch.tensor([[1, 2, 1, 2, 2, 1], [2, 2, 2, 1, 1, 1]])
PICKED = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1]]).bool()
PLACES = PICKED.flatten().nonzero()[:, 0]
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def run(instrument: Instrument, depths: Tensor, recorded: bool = True) -> tuple[Tensor, Tensor]:
    """Exit logits, and those of a whole masked run."""
    ids = tiny_prompt(6, seed=2, batch=2)
    recording = instrument.record(instrument.batch(ids, MASK))
    masks = hard_masks(recording.importance, 0.1)
    attention = recording.attention if recorded else None
    found = instrument.exit_logits(instrument.batch(ids, MASK), masks, depths, PLACES, attention)
    return found, exits(instrument, ids, MASK, masks, depths, attention)[PICKED]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_a_whole_masked_run_read_at_its_exits(family: str, recorded: bool) -> None:
    model = tiny_model(family, seed=3, dtype=torch.float64)
    for depths in (DEPTHS, DEPTHS + 1, torch.full_like(DEPTHS, 1)):
        found, whole = run(attach(model), depths, recorded)
        assert found.shape == (6, 67)
        torch.testing.assert_close(found, whole, atol=1e-10, rtol=1e-8)


def counting(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Which layers ran, without a hook on any."""
    layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
    ran: list[nn.Module] = []
    forward = type(layers[0]).forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(layers[0]), "forward", counted)
    return ran


def test_no_layer_above_the_deepest_exit_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    instrument, ids = attach(model), tiny_prompt(6, seed=2, batch=2)
    recording = instrument.record(instrument.batch(ids, MASK))
    masks = hard_masks(recording.importance, 0.1)
    model(input_ids=ids, output_hidden_states=True)  # transformers leaves hooks that only look
    assert any(module._forward_hooks for module in model.modules())
    left = [len(module._forward_hooks) for module in model.modules()]
    ran = counting(model, monkeypatch)
    unread = DEPTHS.clone()
    unread[~PICKED] = 5  # where nobody looks, depth does not count
    instrument.exit_logits(recording.batch, masks, unread, PLACES, recording.attention)
    assert ran == list(model.model.layers[:2])
    assert [len(module._forward_hooks) for module in model.modules()] == left
    model(input_ids=ids)
    assert len(ran) == 2 + 5  # the model itself is as it was


def test_modules_that_others_watch_run_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharding and offloading count on every module's hooks; accelerate replaces forward."""
    model = tiny_model("llama", num_hidden_layers=5)
    instrument, seen = attach(model), []
    handle = model.model.layers[4].register_forward_hook(lambda *_: seen.append("hook"))
    found, whole = run(instrument, DEPTHS)
    assert seen.count("hook") == 3  # recording, masked run, the whole run it is compared with
    torch.testing.assert_close(found, whole)
    handle.remove()
    own = model.model.layers[4].forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        seen.append("forward")
        return own(*args, **kwargs)

    model.model.layers[4].forward = replaced
    run(instrument, DEPTHS)
    assert seen.count("forward") == 3


def test_gradients_reach_the_layers_below_the_exit_alone() -> None:
    model = tiny_model("gpt2", seed=3, dtype=torch.float64)
    with torch.no_grad():
        ids = tiny_prompt(6, seed=2, batch=2)
        recording = attach(model).record(attach(model).batch(ids, MASK))
        masks = hard_masks(recording.importance, 0.1)
    logits = attach(model).exit_logits(recording.batch, masks, DEPTHS, PLACES, recording.attention)
    logits.square().sum().backward()
    for index, block in enumerate(oracle.blocks(model)):
        touched = [p.grad is not None and bool(p.grad.any()) for p in block.mlp.parameters()]
        assert any(touched) == (index < 2)
