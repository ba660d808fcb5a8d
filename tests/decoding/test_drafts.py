"""Ways to make guesses: by an exit, stopped where it is unsure, and by lookup."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace.decoding import StaticDecoder, greedy
from softtrace.decoding.static_steps import looked_up
from softtrace.errors import InvalidInputError
from tests.support.tiny import tiny_model, tiny_prompt

NEW = 20


def decoder(model: Any, **options: Any) -> StaticDecoder:
    usual = {"exit_layer": 2, "draft_tokens": 4, "capacity": 64, "backend": None}
    return StaticDecoder(model, **{**usual, "eos_token_id": -1, **options})


def found_in(text: list[int], count: int) -> tuple[list[int], bool]:
    tokens = torch.tensor([[*text, *[99] * (12 - len(text))]])
    guesses, found = looked_up(tokens, torch.tensor([[len(text)]]), count)
    return guesses[0].tolist(), bool(found)


def test_lookup_takes_the_last_of_the_longest_matches() -> None:
    assert found_in([1, 2, 3, 4, 5, 1, 2, 3], 2) == ([4, 5], True)
    assert found_in([8, 2, 3, 4, 7, 2, 3, 5, 2, 3], 2) == ([5, 2], True)  # the last of two
    assert found_in([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 1) == ([4], True)  # the longer one
    assert found_in([6, 6, 6], 4) == ([6, 6, 6, 6], True)  # continues beyond the text's end
    assert found_in([1, 2, 1, 2], 5) == ([1, 2, 1, 2, 1], True)
    assert not found_in([1, 2, 3, 4], 2)[1]
    assert not found_in([3, 5, 3], 2)[1]  # one token is no match
    assert not found_in([7], 2)[1]
    assert not found_in([7, 7], 2)[1]


@pytest.mark.parametrize("draft", ["lookup", "both"])
def test_lookup_changes_no_text(draft: str) -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    rows = [tiny_prompt(5)[0], tiny_prompt(6, seed=1)[0].repeat(3), tiny_prompt(1)[0]]
    wanted = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in rows]
    static = decoder(model, rows=3, draft=draft)
    assert [each.tokens.tolist() for each in static.speculate(rows, NEW)] == wanted
    for row, tokens in zip(rows, wanted, strict=True):
        assert static.speculate([row], NEW)[0].tokens.tolist() == tokens


def test_lookup_guesses_right_where_a_text_repeats_itself() -> None:
    model, row = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)[0]
    with torch.no_grad():  # what comes next depends on the last token alone, so texts run in rounds
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    plain = decoder(model, capacity=128).plain([row], 90)[0]
    found = decoder(model, capacity=128, draft="lookup").speculate([row], 90)[0]
    assert torch.equal(plain.tokens, found.tokens)
    assert found.accepted > 0.8 * found.drafted
    assert found.checks < 0.6 * plain.checks


ROWS = [tiny_prompt(5)[0], tiny_prompt(9, seed=1)[0]]


def test_an_unsure_guess_is_the_last_of_its_draft() -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    wanted = [greedy(model, row[None], NEW, -1).tokens.tolist() for row in ROWS]
    drafted = []
    for confidence in (0.0, 0.2, 1.0):
        static = decoder(model, rows=2, confidence=confidence)
        for _ in range(2):
            found = static.speculate(ROWS, NEW)
            assert [each.tokens.tolist() for each in found] == wanted
        drafted.append(sum(each.drafted for each in found))
        if confidence == 1:
            assert all((each.drafted, each.checks) == (0, NEW) for each in found)
    assert drafted[0] > drafted[1] > drafted[2]
    lost = decoder(model, confidence=0.2, exit_map=lambda stream: stream * torch.nan)
    assert lost.speculate(ROWS[:1], NEW)[0].drafted == 0  # no number is none too sure


@pytest.mark.thorough
def test_compiled_drafts_end_at_the_same_guesses() -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    found = []
    for backend in (None, "eager"):
        static = decoder(model, rows=2, confidence=0.2, backend=backend)
        for _ in range(2):
            texts = static.speculate(ROWS, NEW)
            found.append([(each.tokens.tolist(), each.drafted, each.checks) for each in texts])
    assert found == [found[0]] * 4


def test_ways_that_are_none_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        InvalidInputError, match="draft: found 'tree', allowed are 'exit', 'lookup'"
    ):
        decoder(model, draft="tree")
    with pytest.raises(InvalidInputError, match="confidence: found 2"):
        decoder(model, confidence=2)
