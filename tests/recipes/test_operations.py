"""The script that counts the operations of a step."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from softtrace import DensityOptions

pytestmark = pytest.mark.thorough

BENCHMARKS = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"


def test_a_step_on_a_gpu_is_within_its_budget_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    counts = importlib.import_module("operations").counts
    plain, exits, masked = (counts(*how)["all"] for how in ((None, 0), (8, 1), (8, 0)))
    every = DensityOptions().on(torch.device("cuda")).every
    assert every is not None
    assert (exits + (masked - exits) / every) / plain <= 1.25
    recorded = json.loads((BENCHMARKS / "operations.json").read_text(encoding="utf-8"))
    found = recorded["operations"]
    assert [plain, exits, masked] == [
        found[name]["all"] for name in ("plain", "exits read", "masked runs")
    ]


def test_what_is_counted_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("operations")
    with module.Counting() as counting:
        (torch.ones(3) * 2).view(3, 1).t()
    assert counting.found == {"model": 2}  # ones and mul; view and t are views
    assert set(module.counts(8, 0)) == {
        *("model", "recording", "masked run", "sizes", "exits", "rest of the term"),
        *("backward", "all"),
    }
