"""What is alive of long sequences: no map of all layers, and of the square little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import softtrace
from softtrace.errors import NonFiniteError
from softtrace.graph import attention_maps
from softtrace.graph.sizes import total_edges
from tests.support.live_bytes import LiveBytes
from tests.support.tiny import tiny_model, tiny_prompt

LENGTH = 12
THRESHOLDS = (0.3, 0.08, 0.02, 0.004)
LONG, LAYERS, HEADS = 96, 8, 4


@pytest.fixture
def long_model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Eight layers, whose maps of 96 tokens would be several times what may be alive."""
    model = tiny_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=LONG)
    softtrace.attach(model)
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", HEADS * LONG * 12)
    return model


ALL_MAPS = LAYERS * HEADS * LONG * LONG * 4  # bytes of a float32 map of every layer


@pytest.mark.parametrize("attention", ["recorded", "recomputed", "kept"])
def test_no_map_of_all_layers_is_alive(
    long_model: nn.Module, monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    ids = tiny_prompt(LONG)
    monkeypatch.setattr("softtrace.graph.trace._AT_LEAST", 100)
    with LiveBytes() as live, torch.no_grad():
        importance = softtrace.edge_importance(long_model, ids)
        softtrace.extract_trace(importance, size=50)
        total_edges(importance)
    assert live.peak < ALL_MAPS / 2  # 30 tensors of T times d_model, what the model makes itself
    assert live.largest < HEADS * LONG * LONG
    with LiveBytes() as live:
        softtrace.density_curve(
            long_model, ids, thresholds=THRESHOLDS, attention=attention, positions=range(-8, 0)
        )
    assert live.peak < ALL_MAPS / 2
    assert live.largest < HEADS * LONG * LONG


def test_importances_make_no_logits_of_all_tokens_but_check_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_model("llama", vocab_size=1000), tiny_prompt(LENGTH)
    softtrace.attach(model)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 5000)
    with LiveBytes() as live, torch.no_grad():
        softtrace.edge_importance(model, ids)
    assert live.largest <= 5000
    model.lm_head.weight.data[-1] = torch.nan
    with pytest.raises(NonFiniteError, match="logits of the full model"):
        softtrace.edge_importance(model, ids)


def test_memory_grows_with_the_length_and_not_with_its_square(
    long_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for which edges exist, a byte each, and a block of rows."""
    peaks = []
    for length in (LONG // 2, LONG):
        ids = tiny_prompt(length)
        with LiveBytes() as live:
            softtrace.density_curve(long_model, ids, thresholds=[0.05], positions=range(-8, 0))
        peaks.append(live.peak)
    assert peaks[1] < 2.5 * peaks[0]


def test_of_the_square_only_which_edges_exist_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte each, of the recording alone where masked runs have its attention."""
    length = 1024
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 1 << 15)
    model, ids = tiny_model("llama", num_hidden_layers=1), tiny_prompt(length)
    softtrace.attach(model)
    with torch.no_grad(), LiveBytes() as own:
        model(ids, logits_to_keep=1)
    with torch.no_grad(), LiveBytes() as live:
        importance = softtrace.edge_importance(model, ids, positions=[-1])
        softtrace.extract_trace(importance, size=10)
    assert live.peak < 2 * length**2 + own.peak
    del importance
    packed = torch.arange(length).remainder(length // 2)[None]
    with torch.no_grad(), LiveBytes() as live:
        softtrace.edge_importance(model, ids, position_ids=packed, positions=[-1])
    assert live.peak < 1.5 * length**2 + own.peak
    with LiveBytes() as live:
        softtrace.density_curve(model, ids, thresholds=[0.05], positions=[-1])
    assert live.peak < 1.5 * length**2 + own.peak
