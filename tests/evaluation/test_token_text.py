"""Texts of tokens add up to the text, whatever a tokenizer splits and drops."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtrace.evaluation.token_text import TokenText
from tests.support.corpus import END, byte_tokenizer, word_tokenizer
from tests.support.tokenizers import (
    KINDS,
    LOSSLESS,
    TEXTS,
    Make,
    byte_fallback,
    byte_fallback_after_a_space,
    byte_level,
    word_piece,
)

all_kinds = pytest.mark.parametrize("make", KINDS)
lossless = pytest.mark.parametrize("make", LOSSLESS)
on_bytes = pytest.mark.parametrize("make", [byte_tokenizer, byte_level])
made = functools.cache(lambda make: make())  # hypothesis needs one many times

#: characters of one to four bytes, and white space; "▁" is SentencePiece's own space
any_text = st.text().map(lambda text: text.replace("▁", "_"))
many_bytes = st.text("aé日🎉 \r\n")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


@lossless
@pytest.mark.parametrize("language", TEXTS)
def test_texts_called_for_one_by_one_are_the_text(make: Make, language: str) -> None:
    tokenizer, text = made(make), TEXTS[language]
    say = TokenText(tokenizer)
    ids = ids_of(tokenizer, text)
    for _ in range(2):
        assert "".join(say(token) for token in ids) == text
        say.restart()


@lossless
@given(text=any_text)
def test_texts_add_up_to_any_text(make: Make, text: str) -> None:
    tokenizer = made(make)
    assert "".join(TokenText(tokenizer).of_text(ids_of(tokenizer, text))) == text


@all_kinds
@given(text=st.one_of(any_text, st.text("aos, good\n日本")))
def test_texts_add_up_to_what_the_tokenizer_says(make: Make, text: str) -> None:
    """Also where it drops something. What is not in its vocabulary goes by its name."""
    tokenizer = made(make)
    ids = ids_of(tokenizer, text)
    if tokenizer.unk_token_id in ids:
        ids = [token for token in ids if token != tokenizer.unk_token_id]
    assert "".join(TokenText(tokenizer).of_text(ids)) == tokenizer.decode(ids)


@on_bytes
@given(data=st.data())
def test_tokens_in_any_order_are_what_the_tokenizer_says(make: Make, data: st.DataObject) -> None:
    """Of bytes that are no text, none is lost: each is a part of some U+FFFD."""
    tokenizer = made(make)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    assert "".join(TokenText(tokenizer).of_text(ids)) == tokenizer.decode(ids)


@lossless
@given(text=many_bytes, share=st.floats(0, 1))
def test_a_border_inside_of_a_character_loses_that_character_only(
    make: Make, text: str, share: float
) -> None:
    tokenizer = made(make)
    ids = ids_of(tokenizer, text)
    border = int(share * len(ids))
    left, right = (
        "".join(TokenText(tokenizer).of_text(half)) for half in (ids[:border], ids[border:])
    )
    whole = left.rstrip("\ufffd"), right.lstrip("\ufffd")
    lost = len(text) - len("".join(whole))
    if left.endswith("\ufffd"):
        assert right.startswith("\ufffd")
        assert lost == 1
    elif make is byte_fallback_after_a_space and right[:1] != text[len(left) : len(left) + 1]:
        assert (text[len(left)], lost) == (" ", 1)  # as decoding does where a text begins
    else:
        assert lost == 0
    assert text.startswith(whole[0])
    assert text.endswith(whole[1])


def test_a_character_stands_at_the_token_that_completes_it() -> None:
    say, ids = TokenText(byte_tokenizer()), ids_of(byte_tokenizer(), "の!")
    assert say.of_text(ids) == ["", "", "の", "!"]
    assert say.of_text(ids[1:]) == ["\ufffd", "\ufffd", "!"]
    assert say.of_text(ids[:2]) == ["", "\ufffd"]
    assert say.of_text([ids[0], ids[3]]) == ["", "\ufffd!"]


def test_parts_of_characters_alone_are_bytes() -> None:
    say = TokenText(byte_tokenizer())
    assert [say.alone(token) for token in ids_of(byte_tokenizer(), "é\n")] == ["⟨C3⟩", "⟨A9⟩", "\n"]
    tokenizer = byte_fallback()
    say = TokenText(tokenizer)
    assert [say.alone(token) for token in ids_of(tokenizer, "é a\r日")] == [
        "⟨C3⟩", "⟨A9⟩", " a", "\r", "日"
    ]  # fmt: skip
    tokenizer = byte_level()
    say = TokenText(tokenizer)
    several = {say.alone(token) for token in range(len(tokenizer))}
    assert {"⟨E383⟩", " ⟨F09F⟩"} <= several
    assert "" not in several


@lossless
def test_a_replacement_character_of_the_text_is_no_part_of_another(make: Make) -> None:
    tokenizer = made(make)
    ids = ids_of(tokenizer, "a\ufffda")
    assert TokenText(tokenizer).of_text(ids)[-2:] == ["\ufffd", "a"]


def test_the_space_that_decoding_drops_is_dropped_where_a_text_begins_only() -> None:
    tokenizer = word_tokenizer()
    ids, say = ids_of(tokenizer, "the cats"), TokenText(tokenizer)
    assert [tokenizer.decode([token]) for token in ids] == ["the", "cat", "s"]
    assert say.of_text(ids) == ["the", " cat", "s"]
    assert [say.alone(token) for token in ids] == [" the", " cat", "s"]
    assert TokenText(word_piece()).of_text(ids_of(word_piece(), "foos, a")) == [
        "foo",
        "s",
        ",",
        " a",
    ]


@all_kinds
def test_special_tokens_go_by_their_names(make: Make) -> None:
    tokenizer = made(make)
    say, end = TokenText(tokenizer), tokenizer.eos_token_id
    assert say.alone(end) == END
    assert say.of_text([end, end]) == [END, END]
    cut = [ids_of(tokenizer, "é")[0], end]
    assert say.of_text(cut)[1].endswith(END)


def test_what_is_not_in_the_vocabulary_goes_by_a_name() -> None:
    assert TokenText(word_tokenizer()).alone(0) == "<unk>"
    say = TokenText(byte_tokenizer())
    assert say(300) == say.alone(300) == "<300>"


def test_no_tokens_are_no_texts() -> None:
    assert TokenText(byte_tokenizer()).of_text([]) == []
