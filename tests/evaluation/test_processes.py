"""Real processes: the numbers are those of one, to the bit, however the blocks divide; also where
they are killed: what is left is whole, and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softtrace.errors import InvalidInputError
from softtrace.evaluation.parts import FOLDER
from softtrace.evaluation.processes import Processes
from tests.evaluation.test_parts import OPTIONS, contents
from tests.support import warm
from tests.support.calls import CPU
from tests.support.corpus import write_model, write_tree
from tests.support.processes import ROOT, script_environment
from tests.support.waiting import PATIENCE

# MKL rounds by where memory lies, unless told otherwise
ENVIRONMENT = {**script_environment(), "MKL_CBWR": "COMPATIBLE"}


def ranks(count: int, words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """``softtrace evaluate`` with what torchrun tells every process, and nobody to end them."""
    command = [sys.executable, "-m", "softtrace.cli", "evaluate", *words]
    return warm.run_ranks(command, count, ENVIRONMENT)


def words_of(model: Path, text: Path, out: Path) -> list[str]:
    options = {**OPTIONS, "model": model, "data": text, "out": out, "device": CPU.device}
    del options["run"]
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model, text and the results of one process are."""
    root = tmp_path_factory.mktemp("one")
    write_model(root / "model")
    write_tree(root / "text")
    words = words_of(root / "model", root / "text", root / "out")
    done = subprocess.run(  # by an interpreter like any user's
        [sys.executable, "-m", "softtrace.cli", "evaluate", *words],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 5], ids=["one has more", "one has none"])
def test_processes_equal_one(one: Path, tmp_path: Path, count: int) -> None:
    all_done = ranks(count, words_of(one / "model", one / "text", tmp_path / "out"))
    for done in all_done:
        assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(one / "out")
    assert f'"processes": {count}' in (tmp_path / "out" / "density.json").read_text("utf-8")
    assert not (tmp_path / "out" / FOLDER).exists()
    assert sum(done.stdout.count("written to") for done in all_done) == 1


#: dies at the third rename of a file that was written: two parts are there, and half a name
KILLED = """
import os, signal, sys
from softtrace import cli
from softtrace import files

renamed, rename = [], os.replace

def replace(*paths):
    renamed.append(paths)
    if len(renamed) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)

files.os = type("Os", (), {**vars(os), "replace": staticmethod(replace)})
sys.exit(cli.main(["evaluate", *sys.argv[2:]]))
"""


def killed(at: int, words: list[str]) -> int:
    """Exit status of an evaluation that is killed at its ``at``-th rename; never at the 0-th."""
    status: int = warm.run(
        [sys.executable, "-c", KILLED, str(at), *words], env=ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.DEVNULL,
    ).returncode  # fmt: skip
    return status


@pytest.mark.slow
@pytest.mark.parametrize(("at", "parts"), [(3, 2), (6, 4)], ids=["a part", "density.json"])
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    one: Path, tmp_path: Path, at: int, parts: int
) -> None:
    """After four parts come tokens.jsonl and density.json."""
    words = words_of(one / "model", one / "text", tmp_path / "out")
    assert killed(at, words) == -signal.SIGKILL
    assert len(list((tmp_path / "out" / FOLDER).glob("part-*.safetensors"))) == parts
    assert not (tmp_path / "out" / "density.json").exists()
    assert killed(0, [*words, "--resume", "true"]) == os.EX_OK
    assert contents(tmp_path / "out") == contents(one / "out")
    assert not (tmp_path / "out" / FOLDER).exists()


@pytest.mark.slow
def test_what_one_process_refuses_ends_all(tmp_path: Path) -> None:
    """With nobody to end them, as torchrun would: each has to end by itself."""
    model = write_model(tmp_path / "model")
    all_done = ranks(2, words_of(model, tmp_path / "nothing", tmp_path / "out"))
    assert all(done.returncode != 0 for done in all_done)
    assert any("no such file or folder" in done.stderr for done in all_done)
    assert not (tmp_path / "out").exists()


FAILING = """
import sys
from softtrace.errors import DataError, OutputExistsError, SofttraceError
from softtrace.evaluation.processes import Processes

class Cut(DataError):
    def __init__(self, line):
        super().__init__(f"cut off at line {line()}")
        self.line = line  # which cannot be sent

processes, failing = Processes("cpu"), int(sys.argv[1])
FAILURES = [
    (DataError("this one cannot"), DataError),
    (OutputExistsError("it is full"), OutputExistsError),
    (Cut(lambda: 3), DataError),
    (KeyError("name"), SofttraceError),
]

def said(way, work):
    try:
        way(work)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nobody said a word")

assert processes.from_main(lambda: 5) == 5
for way in (processes.together, processes.from_main):
    if way == processes.from_main and failing:
        continue
    for failure, kind in FAILURES:
        def work():
            if processes.index == failing:
                raise failure
        name = "KeyError: " if kind is SofttraceError else ""
        there = kind, f"process {failing} (of 0 to 1) failed: {name}{failure}"
        own = type(failure), str(failure)
        found = said(way, work)
        assert found == (own if processes.index == failing else there), found

def both():
    raise [DataError, OutputExistsError][processes.index]("both")

assert said(processes.together, both) == ([DataError, OutputExistsError][processes.index], "both")
assert processes.together(lambda: 7) == 7  # and all can still talk
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_waits_for_a_process_that_failed_and_all_raise_its_kind(
    tmp_path: Path, failing: int
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    command = [sys.executable, script, failing]
    for done in warm.run_ranks(command, 2, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_leaves_no_state_of_accelerate() -> None:
    from accelerate.state import PartialState

    before = dict(PartialState._shared_state)
    alone = Processes("cpu")
    assert alone.together(lambda: 4) == 4
    assert alone.from_main(lambda: 3) == 3
    assert (alone.count, alone.index, alone.main) == (1, 0, True)
    assert PartialState._shared_state == before


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="device: found 'abacus'"):
        Processes("abacus")
