"""Texts that a model was trained on are known by their content, whatever they are called now."""

from __future__ import annotations

import json
import logging
from hashlib import blake2b
from pathlib import Path

import pytest

from softtrace.data import Document, split_by_file
from softtrace.data.split_record import (
    NAME,
    mark,
    read_records,
    record_split,
    unseen,
    write_records,
)
from softtrace.errors import DataError


def documents(count: int, kind: str = "text") -> list[Document]:
    return [Document(f"{n}.txt", f"{kind} {n}\n\n  has {n} lines\n") for n in range(count)]


def fitted(folder: Path, texts: list[Document], share: float, salt: str = "") -> Path:
    """A model's directory, as far as it tells what was trained on."""
    folder.mkdir(exist_ok=True)
    write_records(folder, [record_split(*split_by_file(texts, share, salt), share, salt)])
    return folder


def refused(texts: list[Document], *models: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(unseen(texts, models, held_out_share=0.5))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def passes(texts: list[Document], *models: Path) -> bool:
    return list(unseen(texts, models, held_out_share=0.5)) == texts


def test_the_runs_own_side_passes_and_others_are_refused(tmp_path: Path) -> None:
    texts = documents(200)
    model = fitted(tmp_path, texts, 0.1, "mine")
    train, held_out = split_by_file(texts, 0.1, "mine")
    assert passes(held_out, model)
    assert passes(split_by_file(texts, 0.05, "mine")[1], model)
    assert passes(documents(50, "another text"), model)
    other = split_by_file(texts, 0.1)[1]
    leaked = [each for each in other if each in train]
    assert 0 < len(leaked) < len(other)
    said = refused(other, model)
    assert f"{model}: was trained on {len(leaked)} of the {len(other)} documents" in said
    assert f"the first is {leaked[0].name};" in said
    assert "fitted with --held_out_share 0.1 --salt 'mine': give these" in said
    larger = split_by_file(texts, 0.5, "mine")[1]
    assert f"{len(larger) - len(held_out)} of the {len(larger)} documents" in refused(larger, model)


def test_what_is_called_otherwise_or_laid_out_otherwise_is_the_same_text(tmp_path: Path) -> None:
    texts = documents(20)
    model = fitted(tmp_path, texts, 0)
    for change in (str.strip, lambda text: text.replace("\n", "\r\n"), lambda text: f"\n{text}\t"):
        changed = [Document(f"row:{n}", change(text)) for n, (_, text, *_) in enumerate(texts)]
        assert "20 of the 20 documents" in refused(changed, model)
    assert passes([Document("0.txt", "text 0\n\n  has 1 lines\n")], model)
    assert passes([Document("0.txt", "text 0 has 0 lines")], model)  # other lines


def test_all_text_on_purpose_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = documents(10)
    model = fitted(tmp_path, texts[:4], 0)
    assert list(unseen(texts, [model], held_out_share=0)) == texts
    [line] = caplog.messages
    assert line.startswith(f"{model} was trained on 4 of these 10 documents")
    assert "on all of its text: give text that is new" in refused(texts, model)


def test_one_of_several_models_is_enough_and_one_without_a_record_is_not_asked(
    tmp_path: Path,
) -> None:
    texts = documents(5)
    new, old = fitted(tmp_path / "new", documents(5, "other"), 0), tmp_path / "old"
    old.mkdir()
    assert passes(texts, new, old, Path("name/on-the-hub"))
    fitted(old, texts, 0)
    assert refused(texts, new, old).startswith(f"{old}: was trained on 5 of the 5")


def test_a_text_that_is_on_both_sides_does_not_refuse_the_runs_own_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*documents(40), *(Document(f"LICENSE{n}", "as is\n") for n in range(20))]
    train, held_out = split_by_file(texts, 0.3)
    both = {each.text for each in train} & {each.text for each in held_out}
    assert both == {"as is\n"}
    model = fitted(tmp_path, texts, 0.3)
    kept = len({each.text for each in held_out})
    assert caplog.messages == [
        f"1 of {kept} texts that are held out are word for word on the training side too"
    ]
    assert passes(held_out, model)
    assert "the first is" in refused(train, model)


LINES = "".join(f"line {n}\n" + "\n" * (n % 5 == 4) for n in range(200))


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n\n", "\n"), "again\n" * 200])
def test_the_tail_of_a_single_document(tmp_path: Path, text: str) -> None:
    """Of another share it is another document, which begins in what was trained on."""
    single = [Document("one.txt", text)]
    model = fitted(tmp_path, single, 0.2)
    head, tail = split_by_file(single, 0.2)
    assert passes(tail, model)
    for share in (0.01, 0.1, 0.19):
        assert passes(split_by_file([Document("renamed", text)], share)[1], model)
    for share in (0.25, 0.5, 0.9):
        larger = split_by_file([Document("renamed", text)], share)[1]
        assert "was trained on 1 of the 1" in refused(larger, model)
    assert "1 of the 1" in refused(single, model)
    assert "1 of the 1" in refused(head, model)
    assert "1 of the 1" in refused(split_by_file(single, 0.1)[1], fitted(tmp_path, single, 0))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    first = record_split(documents(1000), [], 0, "")
    second = record_split(documents(3, "other"), documents(2), 0.4, "ä 'quoted'")
    write_records(tmp_path, [first, second])
    assert read_records(tmp_path) == [first, second]
    assert list(second.trained_on) == sorted(mark(each.text) for each in documents(3, "other"))
    assert (tmp_path / NAME).stat().st_size < 1000 * 12 + 500  # of a document
    assert read_records(tmp_path / "nowhere") == read_records("name/on-the-hub") == []


def test_a_mark_is_the_same_on_every_machine_and_in_every_version() -> None:
    last = blake2b(b"c", digest_size=8).digest()
    whole = blake2b(b"a b" + last, digest_size=8).digest()
    assert mark("a b\n\n c\n") == mark("a  b\nc") == int.from_bytes(whole, "little")
    assert mark("c") == 1957948516733239095
    assert mark("") == mark(" \n") == 0


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 2, "runs": []}', '{"version": 1, "runs": [{"salt": ""}]}',
     '{"version": 1, "runs": [{"salt": "", "held_out_share": 0, "trained_on": "AAA"}]}',
     '{"version": 1, "runs": [{"salt": "", "held_out_share": 0, "trained_on": "AAAA"}]}'],
)  # fmt: skip
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content, encoding="utf-8")
    assert f"{tmp_path / NAME}: cannot be read" in refused(documents(1), tmp_path)


def test_the_record_holds_no_text_and_no_path(tmp_path: Path) -> None:
    fitted(tmp_path, documents(20), 0.3)
    [run] = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["runs"]
    assert run.keys() == {"held_out_share", "salt", "trained_on"}


def test_nothing_is_said_of_texts_that_are_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = fitted(tmp_path, documents(20), 0)
    caplog.set_level(logging.DEBUG)
    assert list(unseen(documents(5, "new"), [model], held_out_share=0))
    assert not caplog.messages
