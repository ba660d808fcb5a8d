"""Windows of whole rows: the same term and gradients, and no map of all layers alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.graph import attention_maps
from tests.support.live_bytes import LiveBytes
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import tiny

WAYS: dict[str, dict[str, Any]] = {
    "straight": {},
    "recomputed": {"attention": "recomputed"},
    "soft": {"masks": "soft"},
    "soft, with sizes": {"masks": "soft", "attention": "recomputed", "size_weight": 0.5},
    "shallow": {"family": "shallow"},
}


def step(model: Any, ids: Tensor, **options: Any) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    density = softtrace.DensityLoss(model, crop=None, share=1.0, every=1, exits=0, **options)
    loss = density(ids).loss
    loss.backward()
    return float(loss.detach()), [
        each.grad.clone() for each in model.parameters() if each.grad is not None
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_row_by_row_is_the_same(
    monkeypatch: pytest.MonkeyPatch, family: str, way: str
) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tiny_prompt(12, batch=2)
    held, expected = step(model, ids, **WAYS[way])
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 2 * 4 * 12 * 5)
    made, found = step(model, ids, **WAYS[way])
    assert made == pytest.approx(held, rel=1e-6)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("way", ["straight", "recomputed", "soft"])
def test_a_step_row_by_row_is_the_same_under_autocast(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Scores that round otherwise where masks are made than where sizes are counted flip edges."""
    model, ids = tiny_model("llama"), tiny_prompt(32, batch=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, expected = step(model, ids, **WAYS[way])
        monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
        monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 2 * 4 * 32 * 7)
        _, found = step(model, ids, **WAYS[way])
    one, other = (torch.cat([each.flatten() for each in of]) for of in (found, expected))
    assert (one - other).norm() < 0.02 * other.norm()  # 0.003 was seen


def test_rows_that_are_made_later_are_those_of_the_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a weight is part of the softmax: it may be trained, sharded or moved since."""
    model, ids = tiny("gpt_oss"), tiny_prompt(12)
    sinks = [each for name, each in model.named_parameters() if "sinks" in name]
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    softtrace.DensityLoss(model, crop=None, every=1, exits=0)(ids, step=0).loss.backward()
    assert [each.grad for each in sinks] == [None] * 3  # recorded attention is a constant
    with torch.no_grad():
        first = softtrace.edge_importance(model, ids).layers[0]
        before = first.attention
        sinks[0].add_(1)
        torch.testing.assert_close(first.attention, before, atol=0, rtol=0)


@pytest.mark.parametrize("way", ["straight", "recomputed", "soft"])
def test_a_step_holds_no_map_of_all_layers(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    length, layers, heads = 128, 8, 4
    model = tiny_model("llama", num_hidden_layers=layers, max_position_embeddings=length)
    ids = tiny_prompt(length)
    softtrace.attach(model)
    with LiveBytes() as held:
        step(model, ids, **WAYS[way])
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", heads * length * 16)
    with LiveBytes() as live:
        step(model, ids, **WAYS[way])
    assert held.largest >= heads * length * length > live.largest
    assert live.peak < held.peak - layers * heads * length * length * 4


@pytest.mark.parametrize(("masks", "copies"), [("straight", 4), ("soft", 12)])
def test_what_a_backward_pass_keeps_counts_where_maps_are_held(
    monkeypatch: pytest.MonkeyPatch, masks: str, copies: int
) -> None:
    """In what masked runs are trained with maps are many times alive; else they are held once."""
    length, layers, heads = 12, 3, 4
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(length)
    held: list[bool] = []

    def noted(*given: Any) -> bool:
        held.append(attention_maps.are_held(*given))
        return held[-1]

    monkeypatch.setattr("softtrace.tracing.recording.are_held", noted)
    for room, expected in ((copies, True), (copies - 1, False)):
        maps = layers * heads * length * length
        monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", room * maps)
        held.clear()
        step(model, ids, masks=masks)
        assert held == [expected] * layers
        with torch.no_grad():
            softtrace.edge_importance(model, ids)
        assert held[-1]
