"""The benchmark of sharded training on tiny sizes: two processes on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import script_environment
from tests.support.warm import run_ranks


@pytest.mark.thorough
def test_both_ways_are_timed_and_what_was_measured_before_stays(tmp_path: Path) -> None:
    out = tmp_path / "sharded.json"
    out.write_text(json.dumps({"models": {"other": {"1 processes": {}}}}), encoding="utf-8")
    words = ["-m", "recipes.benchmarks.speed.sharded", "--models", "tiny", "--out", out]
    words += ["--rounds", "1", "--rows", "2", "--length", "32"]
    root = str(Path(__file__).resolve().parents[2])
    for done in run_ranks([sys.executable, *words], 2, {**script_environment(), "PWD": root}):
        assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["models"]["other"] == {"1 processes": {}}
    (own,) = found["models"]["tiny"].values()
    assert own["batch"] == [2, 32]
    assert own["seconds"].keys() == own["gib"].keys() == {"plain", "default"}
    assert own["rounds"] == 1
