"""Texts of tokens add up to the text, whatever a tokenizer does where a text begins."""

from __future__ import annotations

import pytest

from softtrace.evaluation.token_text import TokenText
from tests.support.corpus import END, byte_tokenizer, word_tokenizer


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
def test_texts_in_a_row_are_the_text(make: type) -> None:
    tokenizer = make()
    ids = tokenizer.encode("the cats at a cat\nthe", add_special_tokens=False)
    text = TokenText(tokenizer)
    assert "".join(map(text, ids)).removeprefix(" ") == tokenizer.decode(ids)
    assert len(ids) > 6


def test_a_space_stays_that_decoding_alone_drops() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer.encode("the cats", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in ids] == ["the", "cat", "s"]
    assert [*map(TokenText(tokenizer), ids)] == [" the", " cat", "s"]


def test_parts_of_characters_and_special_tokens_have_names() -> None:
    text = TokenText(byte_tokenizer())
    assert text(byte_tokenizer().encode("é")[0]) == "Ã"
    assert text(256) == END
    assert TokenText(word_tokenizer())(0) == "<unk>"


def test_an_id_beyond_the_vocabulary_goes_by_its_number() -> None:
    assert TokenText(byte_tokenizer())(300) == "<300>"
