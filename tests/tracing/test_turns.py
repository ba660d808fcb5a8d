"""Runs of a model in parts, in one process: where memory runs out, and other errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from softtrace import density_curve, edge_importance
from softtrace.density import sweep
from softtrace.errors import InvalidInputError
from softtrace.tracing import turns
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.units import WAYS
from tests.support.ways_to_shard import one_process_group

pytestmark = pytest.mark.thorough

IDS = tiny_prompt(6, seed=1, batch=2)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    with one_process_group():
        found = tiny_model("llama", seed=1, dtype=torch.float64)
        WAYS["norm and head, let go"](found)
        yield found
    assert not turns._ACTIVE


def fails(times: int, error: Exception) -> Any:
    """Raises an error so often, then does what it stands in for."""
    own, left = sweep.variation_from, [error] * times

    def stand_in(*args: Any) -> Any:
        if left:
            raise left.pop()
        return own(*args)

    return stand_in


def test_between_runs_the_batch_is_halved(model: nn.Module) -> None:
    wanted = density_curve(model, IDS).total_variation
    runs_out = fails(1, RuntimeError("CUDA out of memory."))
    with patch.object(sweep, "variation_from", runs_out):
        found = density_curve(model, IDS).total_variation
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_in_the_middle_of_a_run_the_end_has_a_name(model: Any) -> None:
    edge_importance(model, IDS)  # attached

    def runs_out(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory.")

    handle = model.model.layers[1].register_forward_pre_hook(runs_out)
    for measure in (edge_importance, density_curve):
        with (
            patch.object(turns, "raise_everywhere") as told,
            pytest.raises(InvalidInputError, match="fewer or shorter sequences at a time"),
        ):
            measure(model, IDS)
        told.assert_not_called()  # the others wait for weights, and would not listen
    handle.remove()
    density_curve(model, IDS)


def test_other_errors_are_left_as_they_are(model: Any) -> None:
    edge_importance(model, IDS)

    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("broken here")

    with (
        patch.object(sweep, "variation_from", breaks),
        pytest.raises(ZeroDivisionError, match="broken here"),
    ):
        density_curve(model, IDS)
    model.model.layers[1].register_forward_pre_hook(breaks)
    with pytest.raises(ZeroDivisionError, match="broken here"):
        density_curve(model, IDS)


def test_norm_and_head_are_let_go_again(model: Any) -> None:
    edge_importance(model, IDS)
    for module in (model.lm_head, model.model.norm):
        assert hasattr(module.weight, "placements")  # of a part
