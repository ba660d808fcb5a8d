"""Several threads that measure one model at the same time: each gets its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace import density_curve, edge_importance
from tests.support.tiny import tiny_model, tiny_prompt

THREADS = 4
PROMPTS = [tiny_prompt(6 + at, seed=at) for at in range(THREADS)]


def curve(model: Any, ids: Tensor) -> Tensor:
    return density_curve(model, ids, thresholds=(0.3, 0.1, 0.01)).total_variation


def importance(model: Any, ids: Tensor) -> Tensor:
    return edge_importance(model, ids).layers[-1].attention.detach()


@pytest.mark.parametrize("measure", [curve, importance])
def test_threads_take_turns_on_one_model(measure: Callable[[Any, Tensor], Tensor]) -> None:
    wanted = [measure(tiny_model("llama"), ids) for ids in PROMPTS]
    model = tiny_model("llama").train()  # not attached: the threads begin with that
    before, ready = model.config._attn_implementation, Barrier(THREADS)

    def measured(ids: Tensor) -> list[Tensor]:
        ready.wait()
        return [measure(model, ids) for _ in range(3)]

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(measured, PROMPTS))
    for ours, own in zip(found, wanted, strict=True):
        for each in ours:
            torch.testing.assert_close(each, own)
    assert model.config._attn_implementation == before
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
