"""Early exit without a check: what went out early, and the whole model's answer after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.decoding import agreement_of, check_cache, check_early_exit, exit_early, greedy
from softtrace.decoding.split_model import first_layers
from softtrace.errors import InvalidInputError
from tests.support.tiny import tiny_model, tiny_prompt

NEW = 20


def literal(model: Any, ids: Tensor, depth: int, confidence: float) -> tuple[list[int], list[bool]]:
    """The same without any cache: every token from a whole run over all tokens before it."""
    tokens: list[int] = []
    early: list[bool] = []
    while len(tokens) < NEW:
        seen = torch.cat((ids, ids.new_tensor([tokens])), dim=1) if tokens else ids
        with torch.no_grad():
            with first_layers(model, depth):
                likely, token = model(seen, use_cache=False).logits[0, -1].softmax(-1).max(-1)
            early.append(bool(tokens) and float(likely) >= confidence)
            if not early[-1]:
                token = model(seen, use_cache=False).logits[0, -1].argmax()
        tokens.append(int(token))
    return tokens, early


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("confidence", [0.0, 0.15, 1.0])
def test_layers_that_were_left_out_read_what_they_missed(family: str, confidence: float) -> None:
    model, ids = tiny_model(family, seed=2, dtype=torch.float64), tiny_prompt(5)
    found = exit_early(
        model, ids, exit_layer=2, confidence=confidence, max_new_tokens=NEW, eos_token_id=-1
    )
    tokens, early = literal(model, ids, 2, confidence)
    assert found.tokens.tolist() == tokens
    assert found.early.tolist() == early
    assert found.layers_saved == pytest.approx(sum(early) / (NEW - 1) / 3)
    if confidence == 1:
        assert found.tokens.tolist() == greedy(model, ids, NEW, -1).tokens.tolist()
        assert agreement_of(model, ids, found.tokens) == 1
    elif confidence:
        assert 0 < sum(early) < NEW - 1
    else:
        assert sum(early) == NEW - 1
        assert agreement_of(model, ids, found.tokens) < 1


def test_of_a_single_token_nothing_is_saved() -> None:
    found = exit_early(
        tiny_model("llama"), tiny_prompt(5), exit_layer=1, confidence=0.0, max_new_tokens=1
    )
    assert (found.early.tolist(), found.layers_saved) == ([False], 0)


def test_an_end_ends_the_text_and_wrong_input_is_named() -> None:
    model, ids = tiny_model("llama", seed=2), tiny_prompt(5)
    plain = exit_early(model, ids, exit_layer=2, confidence=0.15, eos_token_id=-1).tokens.tolist()
    found = exit_early(model, ids, exit_layer=2, confidence=0.15, eos_token_id=plain[4])
    assert found.tokens.tolist() == plain[: plain.index(plain[4]) + 1]
    with pytest.raises(InvalidInputError, match="confidence: found -1"):
        exit_early(model, ids, exit_layer=2, confidence=-1)
    with pytest.raises(InvalidInputError, match="exit_layer: found 3"):
        exit_early(model, ids, exit_layer=3, confidence=0.5)
    for half in (check_early_exit(model), check_cache(check_early_exit(model), (1,))):
        with pytest.raises(InvalidInputError, match="without a proof that the model continues"):
            exit_early(model, ids, exit_layer=2, confidence=0.5, proven_exit=half)
    for wrong in (ids[0, :0], ids):
        with pytest.raises(InvalidInputError, match=r"tokens: found \(.*allowed is \[N\]"):
            agreement_of(model, ids, wrong)
    with pytest.raises(InvalidInputError, match=r"input_ids: found \(1, 0\)"):
        agreement_of(model, ids[:, :0], ids[0])
