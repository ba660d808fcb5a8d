"""The benchmark of sharded training on tiny sizes, one and two processes of a CPU; its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks.pages import cost
from tests.support.processes import script_environment
from tests.support.warm import run_ranks


def measure(out: Path, ranks: int, *more: str) -> dict[str, Any]:
    words = ["-m", "recipes.benchmarks.speed.sharded", "--models", "tiny", "--out", out, *more]
    words += ["--rounds", "1", "--rows", "2", "--length", "32"]
    root = str(Path(__file__).resolve().parents[2])
    for done in run_ranks([sys.executable, *words], ranks, {**script_environment(), "PWD": root}):
        assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.thorough
def test_numbers_of_processes_and_kinds_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sharded.json"
    for ranks, more in ((1, ()), (2, ()), (1, ("--compiled",))):
        found = measure(out, ranks, *more)
    rows = found["models"]["tiny"]
    kind = "activations recomputed"
    assert [(each["processes"], each["kind"]) for each in rows.values()] == [
        (1, kind), (2, kind), (1, f"{kind}, compiled"),
    ]  # fmt: skip
    for row in rows.values():
        assert row["batch"] == [2, 32]
        assert row["seconds"].keys() == row["gib"].keys() == {"plain", "default"}
        assert row["rounds"] == 1
        first, last = row["graphs compiled"]
        assert first == last  # nothing is compiled anew where steps with and without take turns
        assert (first > 0) == ("compiled" in row["kind"])
    monkeypatch.setattr(cost, "read", lambda name: found)
    one, two, compiled = (line for line in cost.sharded().splitlines() if line.startswith("| tiny"))
    assert "(" not in one.rpartition(" | ")[2]
    assert two.startswith("| tiny | activations recomputed | 2 |")
    seconds = [rows[name]["seconds"]["default"]["median"] for name in list(rows)[:2]]
    assert f"({2 * seconds[0] / seconds[1]:.2f}) |" in two
    assert "recomputed, compiled" in compiled
