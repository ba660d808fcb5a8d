"""Plain decoding by direct calls writes what ``model.generate`` does, or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace import UnsupportedModelError
from softtrace.decoding import greedy
from tests.decoding.test_greedy_choice import plain
from tests.decoding.test_speculative import no_cache
from tests.support.tiny import tiny_prompt
from tests.support.zoo import REFUSED, tiny

#: what the layers of hybrid, state-space and other models keep, by the name that is given
KEEPING = {
    "bamba": "LinearAttentionLayer",
    "falcon_h1": "LinearAttentionAndFullAttentionLayer",
    "jamba": "LinearAttentionLayer",
    "lfm2, with convolutions": "LinearAttentionLayer",
    "mamba": "LinearAttentionLayer",
    "minimax": "LinearAttentionLayer",
    "qwen3_next": "LinearAttentionLayer",
    "rwkv": "takes no cache",
}


@pytest.mark.parametrize("case", KEEPING)
def test_models_that_keep_a_state_are_refused_before_any_work(case: str) -> None:
    kind, changes, _ = REFUSED[case]
    model, runs = tiny(kind, **changes), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(UnsupportedModelError, match=KEEPING[case]) as caught:
        greedy(model, tiny_prompt(6), 4)
    assert "decode it with model.generate" in str(caught.value)
    assert not runs


def long_rope(kind: str) -> Any:
    """A model that reads more than 16 tokens by frequencies of their own."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    changes: dict[str, Any] = {"rope_parameters": {**rope, **factors}}
    if kind != "llama":
        changes["original_max_position_embeddings"] = 16
    if kind == "phimoe":
        changes["rope_parameters"].update(short_mscale=1.1, long_mscale=1.2)
    model = tiny(kind, **changes)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("prompt", [4, 15, 16, 17, 20])
@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_a_text_is_read_anew_where_the_model_drops_its_cache(kind: str, prompt: int) -> None:
    model, ids = long_rope(kind), tiny_prompt(prompt, seed=prompt)
    read: list[int] = []
    with torch.no_grad():
        wanted = no_cache(model, ids, 24, ())
    assert plain(model, ids, 24) == wanted
    model.register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert greedy(model, ids, 24).tokens.tolist() == wanted
    assert len(read) == 24
    assert [count for count in read if count > 1] == ([prompt, 17] if prompt <= 16 else [prompt])


@pytest.mark.parametrize("prompt", [4, 16, 20])
def test_a_text_is_read_on_where_the_model_keeps_its_cache(prompt: int) -> None:
    model, ids = long_rope("llama"), tiny_prompt(prompt, seed=prompt)
    wanted = plain(model, ids, 24)
    with torch.no_grad():
        assert (no_cache(model, ids, 24, ()) == wanted) == (prompt > 16)
    assert greedy(model, ids, 24).tokens.tolist() == wanted
