"""Streamed text gives the very blocks of the text read whole, and holds little of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from softtrace.data import (
    encoding,
    pack,
    pack_with_labels,
    read_documents,
    split_by_file,
    text_files,
)
from softtrace.data.blocks import check_block_size, even_places, evenly, stream_evenly
from softtrace.data.documents import Document, stream_documents, stream_held_out
from softtrace.errors import DataError, InvalidInputError
from tests.support.corpus import byte_tokenizer, chat_tokenizer, write_tree

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("count", [1, 5, 100_000])
@pytest.mark.parametrize("block_size", [2, 17])
def test_blocks_are_those_of_the_whole_text(tmp_path: Path, count: int, block_size: int) -> None:
    documents = read_documents(write_tree(tmp_path))
    blocks, seen = stream_evenly(iter(documents), TOKENIZER, block_size, count)
    assert seen == len(documents)
    assert blocks.dtype == torch.int64
    assert torch.equal(blocks, evenly(pack(documents, TOKENIZER, block_size), count))


def test_text_is_read_as_the_tokenizer_gets_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": f"line {number} " * 20} for number in range(300)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(encoding, "_CHARACTERS_PER_CALL", 1000)
    read, most = 0, 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in stream_documents(file):
            read += len(document.text)
            yield document

    tokens = 0
    for piece in encoding.stream_tokens(counted(), TOKENIZER):
        tokens += len(piece)
        most = max(most, read - tokens)
    assert tokens > 50_000
    assert most < 2000  # characters that were read and not given on


def test_a_text_without_one_block() -> None:
    with pytest.raises(DataError, match="the text gives 5 tokens, less than one block of 8"):
        stream_evenly([Document("a", "12345")], TOKENIZER, 8, 4)
    with pytest.raises(DataError, match="the text gives 1 token, less"):
        stream_evenly([Document("a", "1")], TOKENIZER, 8, 4)
    with pytest.raises(DataError, match="there are no documents to encode"):
        stream_evenly([], TOKENIZER, 8, 4)
    with pytest.raises(InvalidInputError, match="block_size: found 1, allowed are integers from 2"):
        stream_evenly([Document("a", "12345")], TOKENIZER, 1, 4)


@pytest.mark.parametrize(
    ("text", "advice"),
    [("ab", r"block of 8. Give more text\.$"), ("abcd", "or a block_size of at most 4")],
)
def test_a_block_size_that_no_command_takes_is_not_advised(text: str, advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        pack([Document("a", text)], TOKENIZER, 8)


@pytest.mark.parametrize("files", [1, 2, 40])
def test_the_held_out_side_is_the_same(tmp_path: Path, files: int) -> None:
    documents = read_documents(write_tree(tmp_path, files))
    assert list(stream_held_out(iter(documents), 0.3, "x")) == split_by_file(documents, 0.3, "x")[1]
    with pytest.raises(InvalidInputError, match=r"held_out_share: found 1, allowed \[0, 1\)"):
        list(stream_held_out(iter(documents), 1, "x"))


def test_a_file_that_is_no_text_in_the_end_gives_nothing_in_the_beginning(tmp_path: Path) -> None:
    good, bad = json.dumps({"text": "good"}).encode(), json.dumps({"text": "bad"}).encode()
    (tmp_path / "a.jsonl").write_bytes(bad + b"\n\xff\n")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + good)
    found = list(stream_documents(tmp_path, (".jsonl",)))
    assert found == [Document("b.jsonl:1", "good"), Document("b.jsonl:3", "good")]
    with pytest.raises(DataError, match=rf"byte 0xff at offset {len(bad) + 1} "):
        list(stream_documents(tmp_path / "a.jsonl"))


def test_a_plain_text_file_has_a_largest_size_and_jsonl_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LARGEST_FILE", 20)
    (tmp_path / "a.txt").write_text("x" * 21)
    (tmp_path / "b.txt").write_text("x" * 20)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n' * 9)
    with pytest.raises(DataError, match=r"a.txt has 21 bytes, allowed are 20: .* a .jsonl with"):
        list(stream_documents(tmp_path / "a.txt"))
    assert len(list(stream_documents(tmp_path / "b.txt"))) == 1
    assert len(list(stream_documents(tmp_path / "c.jsonl"))) == 9
    assert len(list(stream_documents(tmp_path, suffixes=(".txt",)))) == 1  # the other is skipped


# --- which tokens of blocks count


def completions(*parts: tuple[str, str]) -> list[Document]:
    return [
        Document(str(n), json.dumps({"prompt": prompt, "completion": completion}), rendered=True)
        for n, (prompt, completion) in enumerate(parts)
    ]


def test_of_text_every_token_counts_and_blocks_are_those_of_pack(tmp_path: Path) -> None:
    documents = read_documents(write_tree(tmp_path))
    found = pack_with_labels(documents, TOKENIZER, 17)
    assert torch.equal(found.ids, pack(documents, TOKENIZER, 17))
    assert torch.equal(found.labels, found.ids)


def test_labels_are_cut_as_ids_are_and_blocks_without_any_are_dropped() -> None:
    # 8 characters of prompt, 3 of completion and an end are 12 tokens, three blocks of 4
    documents = completions(("promptof", "one"), ("anotherp", "two"))
    every = pack(documents, TOKENIZER, 4)
    assert len(every) == 6
    found = pack_with_labels(documents, TOKENIZER, 4)
    assert torch.equal(found.ids, every[[2, 5]])
    assert TOKENIZER.decode(found.ids.flatten()) == "one<end>two<end>"
    assert torch.equal(found.labels, found.ids)
    # the first of a block is not predicted: a block in which it alone counts gives no loss
    (kept,) = pack_with_labels(completions(("1234567", "89")), TOKENIZER, 4, False).ids[:1]
    assert TOKENIZER.decode(kept) == "1234"
    shifted = pack_with_labels(completions(("123", "456"), ("7", "8")), TOKENIZER, 3)
    assert TOKENIZER.decode(shifted.ids.flatten()) == "456<end>78"
    assert shifted.labels[0].tolist() == shifted.ids[0].tolist()
    assert shifted.labels[1].tolist() == [256, -100, int(shifted.ids[1, 2])]


def test_every_kept_block_has_a_finite_loss() -> None:
    parts = [("p" * (number % 23), "c" * (number % 5)) for number in range(1, 60)]
    found = pack_with_labels(completions(*parts), TOKENIZER, 6)
    assert len(found.ids) < len(pack(completions(*parts), TOKENIZER, 6))
    logits = torch.zeros(len(found.ids), 5, 257)
    for row, labels in zip(logits, found.labels, strict=True):
        assert torch.nn.functional.cross_entropy(row, labels[1:]).isfinite()


def test_data_in_which_nothing_counts_is_refused() -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]})
    with pytest.raises(DataError, match=r"counts no token of 5 blocks of 4 tokens. Check that the"):
        pack_with_labels([Document("a", row, rendered=True)], chat_tokenizer(), 4, True)


@pytest.mark.parametrize("total", [1000, (1 << 24) + 4])  # of the latter float32 gives the next one
def test_even_places_begin_and_end_at_a_block(total: int) -> None:
    assert even_places(total, 3)[[0, -1]].tolist() == [0, total - 1]


def test_a_block_holds_more_than_what_begins_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtrace.data.blocks.beginning", lambda tokenizer: [1, 2, 3])
    check_block_size(4, TOKENIZER)
    with pytest.raises(InvalidInputError, match=r"found 3, allowed are integers from 4"):
        check_block_size(3, TOKENIZER)
