from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from softtrace.data import pack, read_documents, split_by_file
from softtrace.data.documents import Document, held_out
from softtrace.data.encoding import encode
from softtrace.errors import DataError, InvalidInputError
from tests.support.corpus import byte_tokenizer, write_tree

LATIN = "caf\xe9 = 1\n".encode("latin-1")  # the byte at offset 3 is no UTF-8


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# --- read_documents: what is read


def test_folder_is_read_in_order_of_relative_paths_without_caches_and_hidden(
    tmp_path: Path,
) -> None:
    for name in ("b/x.py", "a/z.py", "a.py", "a/readme.md", ".git/x.py", "b/__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "b/.hidden.py").write_text("x", encoding="utf-8")
    (tmp_path / "b/empty.py").write_text(" \n", encoding="utf-8")

    assert [d.name for d in read_documents(tmp_path, (".py",))] == ["a.py", "a/z.py", "b/x.py"]
    assert read_documents(tmp_path)[0].text == "# a.py\n"
    names = [d.name for d in read_documents(tmp_path, suffixes=(".py", ".md"))]
    assert names == ["a.py", "a/readme.md", "a/z.py", "b/x.py"]


def test_a_folder_gives_text_of_every_usual_kind(tmp_path: Path) -> None:
    usual = ["a.C", "b.md", "c.rst", "d.TXT", "e.tex", "f.html", "g.rs", "h.js", "i.py", "j.java"]
    for name in (*usual, "k.png", "l.csv", "Makefile"):
        (tmp_path / name).write_text(f"of {name}", encoding="utf-8")
    write_lines(tmp_path / "m.jsonl", '{"text": "a"}', '{"text": "b"}')
    found = [document.name for document in read_documents(tmp_path)]
    assert found == [*usual, "m.jsonl:1", "m.jsonl:2"]


def test_data_of_a_folder_that_is_not_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "readme.md").write_text("of data", encoding="utf-8")
    for name in ("train.json", "test.jsonl.gz"):
        (tmp_path / name).write_text("[]", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "softtrace.data.documents"):
        assert len(read_documents(tmp_path)) == 1
        assert len(read_documents(tmp_path, (".md",))) == 1  # who names suffixes, means it
        assert len(read_documents(tmp_path, exclude=("*.json", "*.gz"))) == 1
    (message,) = caplog.messages
    assert "2 files under" in message
    assert "test.jsonl.gz" in message


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ["site-packages/p.py", "test/a.py", "test/data/b.py", "x_pb2.py"]),
        (("site-packages",), ["test/a.py", "test/data/b.py", "x_pb2.py"]),
        (("test", "*_pb2.py"), ["site-packages/p.py"]),
        (("test/data", "site-*"), ["test/a.py", "x_pb2.py"]),
        (("test/data/*", "site-*"), ["test/a.py", "x_pb2.py"]),
    ],
)
def test_exclude_globs_match_names_and_relative_paths(
    tmp_path: Path, exclude: tuple[str, ...], left: list[str]
) -> None:
    for name in ("site-packages/p.py", "test/a.py", "test/data/b.py", "x_pb2.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1", encoding="utf-8")
    assert [d.name for d in read_documents(tmp_path, exclude=exclude)] == left


def test_installed_packages_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    write_tree(tmp_path / "site-packages", files=1)
    write_tree(tmp_path / "own", files=1)
    assert [d.name for d in read_documents(tmp_path)] == ["own/part0/file0.py"]
    # ... and a path that leads into them asks for them.
    assert len(read_documents(tmp_path / "site-packages")) == 1


def test_single_file_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_documents(tmp_path / "notes.txt") == [Document("notes.txt", "one\r\ntwo\n")]


def test_jsonl_names_lines_and_keeps_unicode_line_separators(tmp_path: Path) -> None:
    texts = ["one\u2028two", "", "three"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path = write_lines(tmp_path / "d.jsonl", lines[0], "", lines[1], lines[2], "")
    assert read_documents(path) == [
        Document("d.jsonl:1", "one\u2028two"),
        Document("d.jsonl:4", "three"),
    ]


def test_undecodable_files_of_a_folder_are_counted_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path, files=4)
    (tmp_path / "latin.py").write_bytes(LATIN)
    (tmp_path / "binary.py").write_bytes(b"a\0b")
    (tmp_path / "broken_link.py").symlink_to(tmp_path / "nowhere.py")
    with caplog.at_level(logging.WARNING, "softtrace.data.documents"):
        assert len(read_documents(tmp_path)) == 4
    (message,) = caplog.messages
    assert "skipped 3 of 7 files" in message
    assert "binary.py" in message


# --- read_documents: what is refused


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ["no such file", "none.txt"]),
        ("empty.txt", b" \n", ["holds no text", "empty.txt"]),
        ("empty.jsonl", b"\n", ["holds no text"]),
        ("only_empty.jsonl", b'{"text": ""}', ["holds no text"]),
        ("zero.txt", b"abc\0", ["binary", "zero.txt", "offset 3"]),
        ("zero.jsonl", b"\0", ["binary"]),
        ("latin.txt", LATIN, ["not UTF-8", "latin.txt", "0xe9", "offset 3", "iconv"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', ["a.jsonl, line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]', ["line 3", "list", '{"text": "..."}']),
        ("a.jsonl", b'{"content": "x"}', ["line 1", "missing", "content"]),
        ("a.jsonl", b'{"text": 3}', ["line 1", "int"]),
        ("a.jsonl", b'{"text": null}', ["line 1", "NoneType"]),
        ("a.jsonl", rb'{"text": "\ud800"}', ["line 1", "surrogate"]),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(tmp_path / name)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "no file"),
        ({"a.png": b"text"}, "no file"),
        ({"a.py": b"", "b.py": LATIN}, "2 such files, 1 of them unreadable"),
    ],
)
def test_folder_without_text_is_refused(tmp_path: Path, files: dict[str, bytes], part: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=part):
        read_documents(tmp_path)


@pytest.mark.parametrize("name", ["a.ndjson", "A.JSONL", "lines.json"])
def test_lines_of_json_are_read_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, '{"text": "one"}', '{"text": "two", "id": 2}')
    assert read_documents(path) == [Document(f"{name}:1", "one"), Document(f"{name}:2", "two")]


def test_a_list_of_json_objects_is_a_document_each(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.json", "[", '{"text": "one"},', '{"text": " "}, {"text": "x"}]'
    )
    assert read_documents(path) == [Document("a.json:1", "one"), Document("a.json:3", "x")]
    path = write_lines(tmp_path / "b.json", '{"text":', '"one"}')
    assert read_documents(path) == [Document("b.json", "one")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"text": "x"}, {"instruction": "y"}]', "object 2: 'text' is missing"),
        ("a.json", '["x"]', "object 1 holds a JSON str"),
        ("a.json", '{"instruction": "y"}', "'text' is missing"),
        ("a.json", "not json", "is not JSON .*name the file .txt"),
        ("a.json", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.arrow", "ARROW1", r"\.arrow files are not read"),
        ("a.jsonl.gz", "x", r"\.gz files are not read"),
        ("A.CSV", "text,label\nx,1\n", r"\.csv files are not read as rows.*name it \.txt"),
        ("a.tsv", "text\tlabel\n", r"\.tsv files are not read as rows"),
    ],
)
def test_files_of_data_without_texts_are_refused(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_documents(tmp_path / name)


def test_a_table_of_a_folder_is_read_where_its_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    assert read_documents(tmp_path, suffixes=(".csv",)) == [Document("a.csv", "text,label\nx,1\n")]


def test_an_empty_path_is_not_the_working_directory() -> None:
    with pytest.raises(DataError, match=r"data: found an empty path.*shell unset"):
        read_documents("")


def test_json_without_texts_in_a_folder_is_not_skipped(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.json", '[{"text": "x"}]')
    write_lines(tmp_path / "b.json", '[{"instruction": "y"}]')
    with pytest.raises(DataError, match=r"b\.json, object 1: 'text' is missing"):
        read_documents(tmp_path, suffixes=(".json",))


def test_malformed_jsonl_in_a_folder_is_not_skipped(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", '{"text": "x"}', "oops")
    with pytest.raises(DataError, match="line 2"):
        read_documents(tmp_path, suffixes=(".jsonl",))


@pytest.mark.parametrize("suffixes", [".py", ("py",), ()])
def test_suffixes_of_the_wrong_form_are_refused(tmp_path: Path, suffixes: object) -> None:
    with pytest.raises(InvalidInputError, match="suffixes"):
        read_documents(tmp_path, suffixes=suffixes)  # type: ignore[arg-type]


def test_special_files_are_refused_instead_of_waited_for() -> None:
    with pytest.raises(DataError, match="regular file"):
        read_documents("/dev/null")


# --- split_by_file


def documents(number: int) -> list[Document]:
    return [Document(f"folder/file{i}.py", f"text {i}") for i in range(number)]


def test_split_is_a_function_of_each_name() -> None:
    every = documents(400)
    train, out = split_by_file(every, 0.1, "salt")
    assert sorted(train + out) == sorted(every)
    assert 20 <= len(out) <= 60
    # Other files, another order and other texts move nothing.
    some = [Document(d.name, "other") for d in reversed(every[100:])]
    assert {d.name for d in split_by_file(some, 0.1, "salt")[1]} == {
        d.name for d in out if d in every[100:]
    }
    assert all(held_out(d.name, 0.1, "salt") for d in out)


def test_larger_share_adds_files_and_another_salt_takes_others() -> None:
    small = set(split_by_file(documents(400), 0.1, "salt")[1])
    large = set(split_by_file(documents(400), 0.3, "salt")[1])
    assert small < large
    assert not small <= set(split_by_file(documents(400), 0.1, "pepper")[1])


def test_split_does_not_change_between_versions() -> None:
    out = split_by_file(documents(60), 0.1, "salt")[1]
    # Computed apart from the library: int(sha256("salt" + name).hexdigest()[:16], 16) / 2**64
    assert [d.name for d in out] == [f"folder/file{i}.py" for i in (28, 43, 44, 46, 48, 54)]


def test_share_of_zero_holds_nothing_out() -> None:
    assert split_by_file(documents(3), 0) == (documents(3), [])
    assert split_by_file(documents(1), 0) == (documents(1), [])


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(InvalidInputError, match="held_out_share"):
        split_by_file(documents(3), share)


@pytest.mark.parametrize(
    ("text", "share", "tail"),
    [
        ("aaaa\n\nbbbb\n\ncccc\n\ndddd", 0.25, "dddd"),  # a paragraph's end nearby
        ("aaaa\n\n" + "b" * 40 + "\n" + "c" * 10, 0.2, "c" * 10),  # too far off: a line's end
        ("first line\nsecond", 0.01, "second"),  # the only line's end, however far
        ("a\n\nb\n\nc\n", 0.9, "b\n\nc\n"),
    ],
)
def test_single_document_loses_its_tail(text: str, share: float, tail: str) -> None:
    train, out = split_by_file([Document("book.txt", text)], share)
    assert out == [Document("book.txt (tail)", tail)]
    assert train == [Document("book.txt (head)", text.removesuffix(tail))]


def test_tail_is_about_the_share_asked_for() -> None:
    text = "".join(f"paragraph {i}\nof two lines\n\n" for i in range(200))
    (head,), (tail,) = split_by_file([Document("book.txt", text)], 0.05)
    assert head.text + tail.text == text
    assert len(tail.text) == pytest.approx(0.05 * len(text), rel=0.1)
    assert tail.text.startswith("paragraph")


@pytest.mark.parametrize("text", ["one line", "one line\n", "\n\none line\n\n"])
def test_single_line_cannot_be_split(text: str) -> None:
    # study refuses a share of 0, so it must not be sent there
    with pytest.raises(DataError, match=r"single line.* held_out_share=0 \(not to softtrace study"):
        split_by_file([Document("book.txt", text)], 0.5)


# --- encode and pack


def test_packing_gives_back_the_texts_with_ends_between() -> None:
    tokenizer = byte_tokenizer()
    texts = ["def f():\n    return 1\n", "caf\xe9 \N{SNOWMAN}\n", "x" * 50]
    blocks = pack([Document(str(i), text) for i, text in enumerate(texts)], tokenizer, 8)
    assert blocks.dtype == torch.int64
    joined = "<end>".join(texts)
    assert blocks.shape == ((sum(len(t.encode()) for t in texts) + 2) // 8, 8)
    assert joined.startswith(tokenizer.decode(blocks.flatten()))
    assert (blocks == tokenizer.eos_token_id).sum() == 2


def test_encoding_in_portions_equals_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    whole = encode(documents(30), tokenizer)
    monkeypatch.setattr("softtrace.data.encoding._CHARACTERS_PER_CALL", 25)
    assert torch.equal(encode(documents(30), tokenizer), whole)


def test_spelled_out_special_tokens_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    ids = encode([Document("a", "x<end>y")], tokenizer)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "x<end>y"
    # The setting is one call's, not left behind on the tokenizer.
    assert tokenizer("<end>").input_ids == [tokenizer.eos_token_id]


def test_text_short_of_a_block_is_refused() -> None:
    with pytest.raises(DataError, match="gives 6 tokens, less than one block of 8"):
        pack([Document("a", "abcdef")], byte_tokenizer(), 8)


def test_missing_documents_end_token_and_block_are_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="no documents"):
        encode([], tokenizer)
    with pytest.raises(InvalidInputError, match="block_size: found 1, allowed are integers from 2"):
        pack(documents(3), tokenizer, 1)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        encode(documents(3), tokenizer)
