"""Real evaluations that are killed: what is left is whole, and resumes to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softtrace.evaluation.parts import FOLDER
from tests.evaluation.test_parts import contents
from tests.evaluation.test_processes import words_of
from tests.support import warm
from tests.support.corpus import write_model, write_tree
from tests.support.processes import ROOT, script_environment
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.slow

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


def run(at: int, words: list[str], by: Callable[..., Any] = warm.run) -> int:
    """Exit status of an evaluation that is killed at its ``at``-th rename."""
    status: int = by(
        [sys.executable, "-c", KILLED, str(at), *words], cwd=ROOT, timeout=PATIENCE,
        env={**script_environment(), "MKL_CBWR": "COMPATIBLE"}, stdout=subprocess.DEVNULL,
    ).returncode  # fmt: skip
    return status


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model, text and the results of a run that nobody killed are."""
    root = tmp_path_factory.mktemp("straight")
    model, text = write_model(root / "model"), write_tree(root / "text")
    words = words_of(model, text, root / "out")
    assert run(0, words, by=subprocess.run) == os.EX_OK  # by an interpreter like any user's
    return root


# 4 parts, tokens.jsonl, density.json
@pytest.mark.parametrize(("at", "parts"), [(3, 2), (6, 4)], ids=["a part", "density.json"])
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    straight: Path, tmp_path: Path, at: int, parts: int
) -> None:
    words = words_of(straight / "model", straight / "text", tmp_path / "out")
    assert run(at, words) == -signal.SIGKILL
    assert len(list((tmp_path / "out" / FOLDER).glob("part-*.safetensors"))) == parts
    assert not (tmp_path / "out" / "density.json").exists()
    assert run(0, [*words, "--resume", "true"]) == os.EX_OK
    assert contents(tmp_path / "out") == contents(straight / "out")
    assert not (tmp_path / "out" / FOLDER).exists()
