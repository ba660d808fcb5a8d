"""What a capture asks of CUDA, on a machine without it: nothing is captured, but noted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from softtrace.loss import graph_memory


class OfCuda:
    """A stream or a graph.

    Attributes:
        stream: on which it was captured.
        memory: the graph that was the first in the memory where it was captured.
    """

    stream: OfCuda
    memory: OfCuda

    def __init__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: OfCuda) -> None:
        pass

    def pool(self) -> OfCuda:
        return self.memory


def _capture(graph: OfCuda, pool: OfCuda | None, stream: OfCuda, **_: Any) -> nullcontext[None]:
    graph.memory, graph.stream = graph if pool is None else pool, stream
    return nullcontext()


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be captured here; what replays them has to be set."""
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, OfCuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(graph_memory, "_end_capture_of_random_numbers", lambda: None)
