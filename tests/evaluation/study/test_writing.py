"""What models write on: as transformers writes it, and the same however it is batched."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from softtrace.evaluation.study.writing import draws_for, write_on
from tests.support.tiny import tiny_model, tiny_prompt

PROMPTS = tiny_prompt(6, seed=1, batch=3)


def model() -> PreTrainedModel:
    found: PreTrainedModel = tiny_model("llama", seed=2).eval()
    return found


def test_the_most_likely_tokens_are_those_of_generate() -> None:
    network = model()
    wanted = network.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), do_sample=False, max_new_tokens=7,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(write_on(network, PROMPTS, 7), wanted[:, 6:])


def test_a_generation_config_has_no_say() -> None:
    network = model()
    free = write_on(network, PROMPTS, 7)
    network.generation_config.repetition_penalty = 50.0
    network.generation_config.eos_token_id = int(free[0, 0])
    assert torch.equal(write_on(network, PROMPTS, 7), free)


def test_what_is_drawn_is_a_function_of_the_seed_and_not_of_the_batch() -> None:
    network, draws = model(), draws_for(3, 7, seed=4)
    together = write_on(network, PROMPTS, 7, draws)
    alone = [write_on(network, PROMPTS[row, None], 7, draws[row, None]) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, write_on(network, PROMPTS, 7, draws_for(3, 7, seed=5)))
    assert not torch.equal(together, write_on(network, PROMPTS, 7))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    network = model()
    with torch.no_grad():
        likely = network(PROMPTS[:1]).logits[0, -1].softmax(-1).double()
    ends = likely.cumsum(0)
    middles = (ends - likely / 2)[:, None]  # one draw inside of every token's share
    found = write_on(network, PROMPTS[:1].expand(len(likely), -1), 1, middles)
    assert found[:, 0].tolist() == list(range(len(likely)))
    assert float(ends[-1]) == pytest.approx(1)
