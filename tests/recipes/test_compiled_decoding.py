"""The benchmark of compiled decoding: acceptance is what was given; a failure stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks.speed import compiled_decoding

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 2000,
}  # fmt: skip


def test_the_curve_is_over_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled_decoding.MODELS, "tiny", ("Llama", TINY))
    compiled_decoding.main([
        *("--models", "tiny", "--exits", "0.25", "0.5", "--acceptance", "0", "0.5", "1"),
        *("--backends", "none", "no such", "--prompts", "4", "--batch", "2", "--new-tokens", "16"),
        *("--prompt-tokens", "8", "--dtype", "float32", "--device", "cpu", "--no-stock"),
        *("--out", str(tmp_path / "found.json")),
    ])  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["measurements"][0]["found"]
    measured = [each for each in found if "failed" not in each]
    assert [(each["exit_layer"], each["given_acceptance"]) for each in measured] == [
        (depth, share) for depth in (1, 2) for share in (0, 0.5, 1)
    ]
    assert all(each["speedup"]["median"] > 0 for each in measured)
    for each in measured:
        if each["given_acceptance"] != 0.5:
            assert each["tokens_a_check"] == (4 if each["given_acceptance"] else 1)
    assert [each["backend"] for each in found if "failed" in each] == ["no such"] * 2
