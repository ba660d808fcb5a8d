"""Which graphs are made, and what happens where one cannot be; no GPU is asked."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softtrace.loss import cuda_graphs
from softtrace.loss.cuda_graphs import CudaGraphs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda_graphs, "_end_capture_of_random_numbers", lambda: None)
    return CudaGraphs("these runs", "Do without.")


def asked(graphs: CudaGraphs, key: str, cannot: tuple[bool, ...], fuse: bool = True) -> list[Any]:
    """What four steps get, where captures that are fused, or those that are not, fail."""

    def capture(fused: bool) -> Any:
        if fused in cannot:
            raise RuntimeError(f"no way\nfused: {fused}")
        return SimpleNamespace(awaited=False, fused=fused)

    return [graphs.of(key, capture, fuse) for _ in range(4)]


def test_a_key_is_captured_once_it_comes_back(graphs: CudaGraphs) -> None:
    found = asked(graphs, "one", cannot=())
    assert found[:2] == [None, None]
    assert found[2] is found[3]
    assert found[2].fused
    assert asked(graphs, "two", cannot=(), fuse=False)[-1].fused is False
    found[2].awaited = True
    assert asked(graphs, "one", cannot=()) == [None] * 4
    for number in range(4):  # no more than four are held
        asked(graphs, str(number), cannot=())
    assert list(graphs.known) == ["one", "two", "0", "1"]


def test_what_cannot_be_fused_is_captured_as_it_is(
    graphs: CudaGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked(graphs, "one", cannot=(True,))[-1].fused is False
    assert not graphs.refused
    assert [record.getMessage() for record in caplog.records] == [
        "these runs cannot be compiled here and are captured as they are (fuse=False). "
        "What happened: no way"
    ]


def test_what_cannot_be_captured_is_tried_once(
    graphs: CudaGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked(graphs, "one", cannot=(False,), fuse=False) == [None] * 4
    assert graphs.refused
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("these runs cannot be captured as a CUDA graph here")
    assert said.endswith("Do without. What happened: no way")
