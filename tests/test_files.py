"""Result files are whole or not there."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softtrace.errors import OutputExistsError, OutputNotWritableError
from softtrace.files import atomic_path, check_output, finite, prepare_output, write_json


def test_writes_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"τ": [1.0, float("nan"), float("inf")], "n": (1, 2)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {
        "τ": [1.0, None, None],
        "n": [1, 2],
    }


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail_half_way()
    assert json.loads(path.read_text()) == {"old": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass


def test_checking_an_output_folder_creates_nothing(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a", overwrite=False) == tmp_path / "a"
    assert not (tmp_path / "a").exists()
    (tmp_path / "x").write_text("x")
    with pytest.raises(OutputExistsError, match=r"or pass overwrite=True \(--overwrite true\)$"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(OutputExistsError, match=r"or pass a hat$"):
        check_output(tmp_path, False, "a hat")


def test_output_folders(tmp_path: Path) -> None:
    new = prepare_output(tmp_path / "a" / "b", overwrite=False)
    assert new.is_dir()
    assert prepare_output(new, overwrite=False) == new  # empty
    (new / "x").write_text("x")
    with pytest.raises(OutputExistsError, match="found 1 entry, expected a new or empty folder"):
        prepare_output(new, overwrite=False)
    assert prepare_output(new, overwrite=True) == new
    assert (new / "x").read_text() == "x"
    with pytest.raises(OutputExistsError, match="found a file"):
        prepare_output(new / "x", overwrite=True)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=40)
@given(
    st.recursive(
        _LEAVES, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=30
    )
)
def test_json_says_what_was_given_whatever_it_is(obj: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "a.json"), obj)
        text = Path(folder, "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == finite(obj)


def test_a_list_of_numbers_is_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"n": [1, -2.5e-7, float("nan")], "of": [[1], ["[\n 1\n]"]]})
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
    assert lines[1] == ' "n": [1, -2.5e-07, null],'
    assert lines[3] == "  [1],"
    assert json.loads("\n".join(lines))["of"] == [[1], ["[\n 1\n]"]]


def test_prepare_output_makes_parents_and_refuses_a_file(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / "a" / "b", overwrite=False).is_dir()
    assert prepare_output(tmp_path / "a" / "b", overwrite=False).is_dir()  # still empty
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="found a file"):
        prepare_output(tmp_path / "file", overwrite=True)


def test_write_json_has_no_nan_and_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": [math.nan, math.inf, 1.5], "é": (True, None)})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "x": [None, None, 1.5],
        "é": [True, None],
    }
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_write_json_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["there", "not/there"])
def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return not mode & os.W_OK

    monkeypatch.setattr(os, "access", access)  # who is root may write anywhere
    with pytest.raises(OutputNotWritableError, match="may not be written to; choose another"):
        check_output(tmp_path / name, False)
    assert asked == [tmp_path / "there" if name == "there" else tmp_path]
    assert not (tmp_path / "not").exists()
