"""``softtrace inspect``: what it shows while it works, and whose edges it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace.cli import inspect
from softtrace.graph.sizes import edge_counts
from softtrace.tracing.attach import attach
from tests.support.tiny import tiny_model


def test_it_shows_how_many_layers_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tqdm = inspect.tqdm
    monkeypatch.setattr(inspect, "tqdm", lambda **options: tqdm(**{**options, "delay": 0}))
    model = tiny_model("llama")
    instrument = attach(model)
    inspect.describe(instrument, 1_200)
    assert "counting the edges of 1,200 tokens: 100%" in capsys.readouterr().err
    assert not any(layer.layer._forward_hooks for layer in instrument.anatomy.layers)


def test_a_quick_one_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    inspect.describe(attach(model), 12)
    assert capsys.readouterr().err == ""


def test_only_the_last_token_s_edges_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all tokens take time that grows with the cube of the length."""
    found: list[Any] = []

    def counted(*args: Any) -> torch.Tensor:
        found.append(edge_counts(*args))
        return found[-1]

    monkeypatch.setattr(inspect, "edge_counts", counted)
    model = tiny_model("llama")
    edges = inspect.describe(attach(model), 12)["edges"]
    assert found[0].shape[:2] == (1, 1)
    assert edges["total"] == int(found[0].sum())
