"""Which text a command reads: all of it, or what a split holds out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from softtrace.data import read_documents, split_by_file
from softtrace.data.text_source import TextSource
from softtrace.errors import DataError
from tests.support.corpus import write_tree


def test_reads_all_or_what_training_held_out(tmp_path: Path) -> None:
    text = str(write_tree(tmp_path / "text"))
    everything = read_documents(text)
    assert TextSource(text).documents() == everything
    assert TextSource(text).split == "all"
    half = TextSource(text, held_out_share=0.5, salt="x")
    assert half.documents() == split_by_file(everything, 0.5, "x")[1]
    assert half.split == "held out, share 0.5"
    assert isinstance(half.stream(), Iterator)


def test_suffixes_and_globs_choose_files(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.py"):
        (tmp_path / name).write_text(f"text of {name}")
    found = TextSource(str(tmp_path), suffixes=(".md",), exclude=("b*",)).documents()
    assert [document.name for document in found] == ["a.md"]


def test_says_what_to_change_where_nothing_is_held_out(tmp_path: Path) -> None:
    source = TextSource(str(write_tree(tmp_path / "text")), held_out_share=1e-9)
    with pytest.raises(DataError, match="no file is held out at a share of 1e-09; give more files"):
        source.documents()
