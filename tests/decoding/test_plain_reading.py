"""Plain decoding by direct calls writes what ``model.generate`` does, or refuses."""

from __future__ import annotations

import pytest

from softtrace import UnsupportedModelError
from softtrace.decoding import greedy
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
