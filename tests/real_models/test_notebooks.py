"""The notebook that traces a token takes real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.notebooks import run
from tests.support.real import SMOLLM, place

pytestmark = pytest.mark.real


def test_one_token_of_a_real_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("trace_one_token.ipynb", monkeypatch, MODEL=Path(place(SMOLLM)).resolve())
    kinds = {edge.kind for edge in found["trace"].edges}
    assert {"attention", "mlp", "attention_residual"} <= kinds
    assert 0 < found["needed"][found["position"]] < 1
