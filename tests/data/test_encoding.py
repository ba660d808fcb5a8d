"""Texts begin and end as the tokenizer has it, and special tokens in them are what they were."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import processors

from softtrace.data import beginning, encode, pack, pack_with_labels
from softtrace.data.blocks import stream_evenly
from softtrace.data.documents import Document, SpecialTokens
from softtrace.errors import InvalidInputError
from tests.support.corpus import byte_tokenizer

BOS, END = 257, 256
WORDS = [Document(str(number), "some words " * (3 + number)) for number in range(4)]


def bos_tokenizer(template: str = "<bos>:0 $A:0") -> object:
    """The tokenizer of bytes, with ``<bos>`` in front of every text, as Gemma's and Llama's."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<turn>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<turn>", 258), ("<end>", END)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "added"),
    [
        ("$A:0", []),
        ("<bos>:0 $A:0", [BOS]),
        ("$A:0 <end>:0", []),
        ("<bos>:0 <turn>:0 $A:0 <end>:0", [BOS, 258]),
    ],
)
def test_what_is_put_in_front_of_a_text(template: str, added: list[int]) -> None:
    assert beginning(bos_tokenizer(template)).tolist() == added


@pytest.mark.parametrize("block_size", [2, 3, 16, 40])
def test_every_block_begins_as_the_tokenizer_begins_a_text(block_size: int) -> None:
    tokenizer = bos_tokenizer()
    blocks = pack(WORDS, tokenizer, block_size)
    assert bool((blocks[:, 0] == BOS).all())
    row = encode(WORDS, tokenizer)
    assert BOS not in row
    bodies = blocks[:, 1:].flatten()
    assert torch.equal(bodies, row[: len(bodies)])
    assert len(row) - len(bodies) < block_size - 1
    streamed, seen = stream_evenly(iter(WORDS), tokenizer, block_size, 1000)
    assert torch.equal(streamed, blocks)
    assert seen == len(WORDS)


def test_all_that_the_tokenizer_puts_in_front_stands_there() -> None:
    tokenizer = bos_tokenizer("<bos>:0 <turn>:0 $A:0 <end>:0")
    blocks = pack(WORDS, tokenizer, 8)
    assert blocks[:, :2].unique(dim=0).tolist() == [[BOS, 258]]
    found = pack_with_labels(WORDS, tokenizer, 8)
    assert torch.equal(found.ids, blocks)
    assert found.labels[:, :2].unique().tolist() == [-100]  # nobody has to predict it
    assert torch.equal(found.labels[:, 2:], blocks[:, 2:])
    assert int((blocks == BOS).sum()) == len(blocks)
    with pytest.raises(InvalidInputError, match=r"found 2, allowed are integers from 3: .* puts 2"):
        pack(WORDS, tokenizer, 2)


def test_a_text_that_has_its_own_beginning_gets_no_second_one() -> None:
    rendered = [Document(str(number), "<bos><turn>1234567") for number in range(4)]
    blocks = pack(rendered, bos_tokenizer(), 10)  # 9 tokens of text and the end, exactly a block
    assert blocks[:, :3].unique(dim=0).tolist() == [[BOS, 258, ord("1") - 33]]
    assert int((blocks == BOS).sum()) == len(blocks) == 3
    shifted = pack(rendered, bos_tokenizer(), 8)
    assert bool((shifted[:, 0] == BOS).all())
    assert torch.equal(shifted[0, :3], blocks[0, :3])


@pytest.mark.parametrize(
    ("how", "text", "tokens"),
    [
        ("auto", "<turn>1", True),
        ("auto", " <turn>1\n", True),
        ("auto", "1<turn>\n", True),
        ("auto", "1<turn>2", False),
        ("characters", "<turn>1", False),
        ("tokens", "1<turn>2", True),
    ],
)
def test_special_tokens_in_a_text(how: SpecialTokens, text: str, tokens: bool) -> None:
    tokenizer = bos_tokenizer()
    ids = encode([Document("a", text, how)], tokenizer)
    assert tokenizer.decode(ids) == text
    assert (258 in ids) is tokens
    assert len(ids) == len(text) - tokens * (len("<turn>") - 1)


def test_ways_of_reading_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bos_tokenizer()
    texts = ["<turn>a", "b<turn>c", "d<turn>", "plain"] * 3
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    ids = encode(documents, tokenizer)
    assert tokenizer.decode(ids) == "<end>".join(texts)
    assert int((ids == 258).sum()) == 6
    monkeypatch.setattr("softtrace.data.encoding._CHARACTERS_PER_CALL", 9)
    assert torch.equal(encode(documents, tokenizer), ids)


def test_a_text_that_ends_by_itself_gets_no_second_end() -> None:
    documents = [Document(str(number), text) for number, text in enumerate(["1<end>\n", "2", "3"])]
    tokenizer = bos_tokenizer()
    ids = encode(documents, tokenizer)
    assert tokenizer.decode(ids) == "1<end>\n2<end>3"
    assert int((ids == END).sum()) == 2
    spelled = [each._replace(special_tokens="characters") for each in documents]
    assert int((encode(spelled, tokenizer) == END).sum()) == 2
    assert tokenizer.decode(encode(spelled, tokenizer)) == "1<end>\n<end>2<end>3"


def test_special_tokens_that_are_read_as_characters_are_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    documents = [Document(f"{number}.md", "of <turn> and <bos>.") for number in range(3)]
    with caplog.at_level(logging.WARNING):
        encode(documents, bos_tokenizer())
        encode([each._replace(special_tokens="characters") for each in documents], bos_tokenizer())
    (message,) = caplog.messages
    assert message.startswith("0.md: found the special token '<")
    assert "set special_tokens to 'tokens'" in message
