"""Result files are whole or not there."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softtrace import files
from softtrace.errors import InvalidInputError, OutputExistsError, OutputNotWritableError
from softtrace.files import (
    LOCK,
    atomic_path,
    check_output,
    claimed,
    claims_out,
    finite,
    prepare_output,
    write_json,
)
from tests.support import warm
from tests.support.waiting import wait_until


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


def test_an_empty_path_is_not_the_working_directory() -> None:
    with pytest.raises(InvalidInputError, match="out: found an empty path"):
        check_output("", overwrite=True)
    with pytest.raises(InvalidInputError, match="out: found an empty path"), claimed(""):
        pass


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


def test_a_folder_is_one_runs_own_as_long_as_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for _ in range(2):
        with claimed(out):
            assert check_output(out, overwrite=False) == out  # its lock is no result
            with (
                pytest.raises(
                    OutputExistsError, match=f"another run .* \\(process {os.getpid()} on"
                ),
                claimed(out),
            ):
                pytest.fail("it is taken")
            assert (out / LOCK).exists()  # who was refused takes nothing away
        assert not (tmp_path / "new").exists()  # nothing was written to it


def test_what_a_run_wrote_stays_and_what_was_there_too(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "result").touch()
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["result"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), claimed(tmp_path / "empty"):
        raise KeyError
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_cannot_be_written_to_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="found a file"), claimed(tmp_path / "file"):
        pytest.fail("it is no folder")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    long = tmp_path / "new" / ("x" * 300)  # more than any file system takes
    with pytest.raises(OutputNotWritableError, match="cannot be made"), claimed(long):
        pytest.fail("there is no such folder")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_while_it_was_opened_is_not_taken_for_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the run that had it ends at that very moment, and another one begins."""
    lock, opened = files.fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(descriptor)
        lock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with claimed(tmp_path), pytest.raises(OutputExistsError), claimed(tmp_path):
        pytest.fail("it is taken")
    assert len(opened) == 3


def test_a_folder_that_was_removed_while_it_was_claimed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out", []

    def opening(path: Path, *options: int) -> int:
        asked.append(path)
        if len(asked) == 1:
            out.rmdir()
        return os.open(path, *options)

    monkeypatch.setattr(files, "os", type("Os", (), {**vars(os), "open": staticmethod(opening)}))
    with claimed(out):
        assert (out / LOCK).exists()
    assert asked == [out / LOCK] * 2


def test_where_files_cannot_be_locked_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_command_claims_its_out(tmp_path: Path) -> None:
    @claims_out
    def command(text: str, out: Path, overwrite: bool = False) -> str:
        """What it does."""
        assert (out / LOCK).exists()
        return text

    assert command("a", out=tmp_path) == command("a", tmp_path, True) == "a"
    assert command.__doc__ == "What it does."
    with claimed(tmp_path), pytest.raises(OutputExistsError, match="another run"):
        command("a", tmp_path)


HOLDING = """
import sys, time
from pathlib import Path
from softtrace.files import claimed
with claimed(sys.argv[1]):
    Path(sys.argv[1], "begun").touch()
    time.sleep(600)
"""


@pytest.mark.thorough
def test_a_killed_run_keeps_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLDING, str(out)]
    process = warm.Process(command, stdout=subprocess.PIPE)
    try:
        wait_until((out / "begun").exists, "the other process")
        with (
            pytest.raises(OutputExistsError, match=rf"\(process {process.pid} on "),
            claimed(out),
        ):
            pytest.fail("it is taken")
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (out / LOCK).exists()
    with claimed(out):
        assert (out / LOCK).read_text(encoding="utf-8").startswith(f"{os.getpid()} on ")
    assert [path.name for path in out.iterdir()] == ["begun"]


def test_a_folder_inside_of_a_file_is_refused_by_what_is_wrong(tmp_path: Path) -> None:
    """It was told to change permissions."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    with pytest.raises(OutputExistsError, match=r"rows\.jsonl is a file, in which no"):
        check_output(file / "deep" / "out", overwrite=True)
