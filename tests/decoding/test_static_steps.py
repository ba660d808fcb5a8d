"""Steps that are captured once: what a graph does not see of a model makes it captured anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from softtrace.decoding import StaticDecoder, greedy
from softtrace.decoding.static_steps import Runner
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """The steps that were captured, each of which is run as it is."""
    found: list[Callable[[], Any]] = []

    def capture(runner: Runner, call: Callable[[], Any]) -> Callable[[], Any]:
        found.append(call)
        return call

    monkeypatch.setattr(Runner, "_captured", capture)
    return found


def test_switched_and_merged_adapters_are_captured_anew(captured: list[Callable[[], Any]]) -> None:
    """Merged, the weights lie where they lay, and a graph would add the adapters once more."""
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_model("llama"), config).eval()
    model.add_adapter("other", config)
    static = StaticDecoder(
        model, exit_layer=2, draft_tokens=3, capacity=64, backend=None, eos_token_id=-1
    )
    static._runner.cuda_graphs = True
    prompt = tiny_prompt(5)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: model.set_adapter("other"),
        lambda: layer.scale_layer(2.0),
        model.merge_adapter,
        model.unmerge_adapter,
        model.base_model.disable_adapter_layers,
    ]
    for change in changes:
        change()
        captured.clear()
        found = static.plain([prompt[0]], 8)[0].tokens
        assert len(captured) == 1
        assert static.plain([prompt[0]], 8)[0].tokens.tolist() == found.tolist()
        assert len(captured) == 1
        wanted = greedy(model, prompt, max_new_tokens=8, eos_token_id=-1).tokens
        assert found.tolist() == wanted.tolist()
