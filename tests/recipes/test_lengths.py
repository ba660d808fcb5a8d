"""The script that measures how memory and time grow with the length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks.speed import lengths

pytestmark = pytest.mark.thorough

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 40_001}  # fmt: skip


def test_what_was_measured_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lengths.json"
    monkeypatch.setitem(lengths.MODELS, "SmolLM2-135M", ("Llama", TINY))
    command = ["lengths", "--device", "cpu", "--models", "SmolLM2-135M", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--lengths", "64", "--what", "forward"])
    lengths.main()
    first = json.loads(out.read_text(encoding="utf-8"))["rows"]
    monkeypatch.setattr("sys.argv", [*command, "--lengths", "64", "96"])
    lengths.main()
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows[0] == first[0]
    assert [(row["length"], row["what"]) for row in rows] == [
        (length, what) for length in (64, 96) for what in lengths.MEASURED
    ]
    assert all(row["peak_gib"] > 0 and row["seconds"] > 0 for row in rows)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_result_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object, ids: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(lengths.MEASURED, "forward", full)
    ids, model = torch.ones(1, 4), torch.nn.Linear(1, 1)
    assert lengths.measured(model, ids, "forward", ids.device) == {"error": "out of memory"}
