"""The same texts in the tokens of two tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace.evaluation.study.same_text import same_texts
from tests.support.corpus import byte_tokenizer
from tests.support.tokenizers import byte_level

TEXT = "good morning, foo bar baz and good night"


def ids(tokenizer: Any, text: str = TEXT) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_another_tokenizer_has_the_tokens_that_end_in_the_context_and_its_own_next_one() -> None:
    first, second = byte_tokenizer(), byte_level()
    block = torch.tensor(ids(first)[:21])  # a byte each: 20 characters and the one after them
    found = same_texts(block[None], [first, second])
    assert found.left_out == {}
    (own,), (other,) = found.inputs
    assert torch.equal(own, block)
    whole = ids(second, TEXT[:21])
    said = [second.decode(whole[: count + 1]) for count in range(len(whole))]
    inside = sum(len(text) <= 20 for text in said)
    assert other.tolist() == whole[: inside + 1]
    assert len(other) < len(own)  # it has pieces of several bytes


def test_models_of_one_tokenizer_have_the_blocks() -> None:
    first = byte_tokenizer()
    blocks = torch.tensor([ids(first)[:9], ids(first)[9:18]])
    found = same_texts(blocks, [first, first])
    assert all(torch.equal(torch.stack(own), blocks) for own in found.inputs)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("ab日", "a character that is cut"), ("a\ufffdb", "a character that is cut")],
)
def test_texts_that_cannot_be_had_are_left_out_for_all_and_counted(text: str, reason: str) -> None:
    first, second = byte_tokenizer(), byte_level()
    good, bad = ids(first, "good foo"), ids(first, text + "xxxxxxx")[:8]
    if "日" in text:
        bad = ids(first, "xxxxx" + text)[:8]  # ends inside of the last character
    found = same_texts(torch.tensor([good, bad, good]), [first, second])
    assert [len(own) for own in found.inputs] == [2, 2]
    assert found.left_out == {reason: 1}
