"""Rows of Parquet files and of data sets of the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from softtrace.data import read_documents, split_by_file
from softtrace.data.documents import Document, stream_documents
from softtrace.data.tables import HubDataset, hub_dataset
from softtrace.data.text_source import TextSource
from softtrace.errors import DataError
from tests.support.corpus import write_parquet

MESSAGES = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "assistant", "content": "Four."},
]


def test_rows_of_a_parquet_file_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": " ", "id": 2}, {"text": None, "id": 3}]
    path = write_parquet(tmp_path / "a [1]*?.parquet", [*rows[:2], {"text": "x", "id": 4}])
    assert read_documents(path) == [
        Document("a [1]*?.parquet:1", "one"),
        Document("a [1]*?.parquet:3", "x"),
    ]
    with pytest.raises(
        DataError, match=r"b.PARQUET, row 3: 'text' is of type NoneType.*a column 'text'"
    ):
        read_documents(write_parquet(tmp_path / "b.PARQUET", rows))


def test_nulls_that_a_table_adds_are_not_there(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, "tools": None}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "b", "arguments": {"c": 1}}}]}
    found, other = read_documents(
        write_parquet(tmp_path / "a.parquet", [row, {"messages": [call], "tools": []}])
    )
    assert found.rendered
    assert json.loads(found.text) == {"messages": MESSAGES}
    assert json.loads(other.text) == {"messages": [call]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert read_documents(path)[0].text == found.text


def test_json_columns_of_the_library_are_read_as_json(tmp_path: Path) -> None:
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_dict({"messages": [MESSAGES]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    (found,) = read_documents(tmp_path / "a.parquet")
    assert json.loads(found.text) == {"messages": MESSAGES}


def test_a_large_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"text {n}"} for n in range(2500)])
    reading = stream_documents(path)
    assert next(reading).name == "a.parquet:1"
    reading.close()
    assert [document.text for document in read_documents(path)][2000] == "text 2000"


def test_files_of_a_folder_are_read_by_default(tmp_path: Path) -> None:
    for name in ("b", "sub/a"):
        write_parquet(tmp_path / f"{name}.parquet", [{"text": f"{name} {n}"} for n in range(2)])
    (tmp_path / "c.md").write_text("prose")
    assert [document.name for document in read_documents(tmp_path)] == [
        "b.parquet:1", "b.parquet:2", "c.md", "sub/a.parquet:1", "sub/a.parquet:2",
    ]  # fmt: skip


def test_a_damaged_file_is_named_also_in_a_folder(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "a.parquet", [{"text": "one"}]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path, tmp_path / "b.parquet"):
        with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet"):
            read_documents(path)


@pytest.mark.parametrize("path", ["a.parquet", "hf://datasets/owner/name"])
def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"text": "one"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


# --- the hub


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("hf://datasets/owner/name", HubDataset("owner/name", None, "train")),
        ("hf://datasets/owner/name:test", HubDataset("owner/name", None, "test")),
        ("hf://datasets/owner/name/small", HubDataset("owner/name", "small", "train")),
        ("hf://datasets/o/n/small:test[:10%]", HubDataset("o/n", "small", "test[:10%]")),
        (Path("hf://datasets/owner/name:test"), HubDataset("owner/name", None, "test")),
        ("owner/name", None),
        ("datasets/owner/name", None),
        ("/hf/datasets/owner", None),
    ],
)
def test_only_its_own_spelling_leads_to_the_hub(path: Any, found: HubDataset | None) -> None:
    assert hub_dataset(path) == found


@pytest.mark.parametrize("path", ["hf://datasets/imdb", "hf://", "hf://datasets/a/b/c/d.parquet"])
def test_other_addresses_of_the_hub_are_explained(path: str) -> None:
    with pytest.raises(DataError, match=r"is written hf://datasets/OWNER/NAME\[/CONFIG\]"):
        read_documents(path)


def test_a_misspelt_path_is_told_how_the_hub_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=r"no such file .* hub is written hf://datasets/OWNER/NAME"):
        read_documents(tmp_path / "owner" / "name")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    return tmp_path


def test_rows_of_a_data_set_are_documents(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loaders of datasets themselves, which read a folder ``owner/name`` alike."""
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "id": n} for n in range(20)]
        write_parquet(cache / "owner" / "name" / f"{split}.parquet", rows)
    monkeypatch.chdir(cache)
    found = read_documents("hf://datasets/owner/name")
    assert found[:2] == [
        Document("owner/name:train:1", "train 0"),
        Document("owner/name:train:2", "train 1"),
    ]
    assert len(found) == 20
    assert read_documents("hf://datasets/owner/name:test[:3]") == [
        Document(f"owner/name:test[:3]:{n + 1}", f"test {n}") for n in range(3)
    ]
    source = TextSource("hf://datasets/owner/name", held_out_share=0.3)
    assert source.documents() == split_by_file(found, 0.3)[1]
    with pytest.raises(DataError, match=r"owner/name:dev: cannot be loaded .*dev"):
        read_documents("hf://datasets/owner/name:dev")


def test_configuration_and_split_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"messages": MESSAGES, "tools": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = read_documents("hf://datasets/owner/name/small:test")
    assert asked == [(("owner/name", "small"), {"split": "test"})]
    assert found.name == "owner/name/small:test:1"
    assert json.loads(found.text) == {"messages": MESSAGES}


def test_what_the_hub_says_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/none' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"/none:train: cannot be loaded .*Couldn't reach") as said:
        read_documents("hf://datasets/owner/none")
    assert "\n" not in str(said.value)
