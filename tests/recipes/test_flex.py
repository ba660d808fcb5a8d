"""The script that compares FlexAttention with masked attention block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks.speed import flex

pytestmark = pytest.mark.thorough


def test_both_ways_give_the_same_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "flex.json"
    monkeypatch.setattr(flex, "LAYERS", {"tiny": (4, 2, 16)})
    options = ["--device", "cpu", "--lengths", "64", "--calls", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["flex", *options])
    flex.main()
    found = json.loads(out.read_text(encoding="utf-8"))
    single, half = found["rows"]
    assert single["flipped"] == 0 < single["kept"]
    assert single["largest_difference"] < 2e-6 < 0.1 < single["largest_output"]
    assert half["largest_difference"] > single["largest_difference"]
    assert found["command"].startswith("flex --device cpu")


def test_flipped_edges_are_counted() -> None:
    both = flex.BothWays((4, 2, 16), 32, torch.float32, torch.device("cpu"))
    assert both.flips()[0] == 0
    both.bound[0, 1, 20] = -torch.inf  # FlexAttention keeps all 21 edges of this target
    left_out = 21 - int(both.mask.whole()[0, 1, 20].sum())
    assert both.flips()[0] == left_out > 0
