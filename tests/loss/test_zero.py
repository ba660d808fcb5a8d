"""The term in a plain loop by DeepSpeed's ZeRO 1, 2 and 3, if DeepSpeed is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softtrace import DensityLoss, density_curve
from tests.support.processes import as_rank
from tests.support.skips import deepspeed
from tests.support.tiny import tiny_model
from tests.support.ways_to_shard import (
    OPTIONS,
    STEPS,
    batch,
    model_and_optimizer,
    of_all_ranks,
    of_ranks,
    trained,
    whole_weights,
)
from tests.support.ways_to_zero import ALONE, FAMILIES, family, uneven

pytestmark = [pytest.mark.thorough, deepspeed]


@pytest.mark.parametrize("way", ["ZeRO 1", "ZeRO 2"])
def test_two_processes_train_as_one(tmp_path: Path, way: str) -> None:
    check_default(of_ranks(tmp_path, 2, way), way)


def check_default(found: list[dict[str, Any]], way: str) -> None:
    losses, *wanted = trained(None, OPTIONS["default"], STEPS, 0, 2, torch.float32)
    for rank, each in enumerate(found):
        own, *others = each[f"{way}, default"]
        torch.testing.assert_close(own, losses[rank::2], atol=1e-5, rtol=0)
        torch.testing.assert_close(others, wanted, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found by ZeRO 3."""
    return of_ranks(tmp_path_factory.mktemp("parts"), 2, "ZeRO 3", "all else")


def test_weights_in_parts_train_as_whole_ones(parts: list[dict[str, Any]]) -> None:
    check_default(parts, "ZeRO 3")
    losses, *wanted = trained(None, OPTIONS["soft"], 4, 0, 2, torch.float32)
    for rank, found in enumerate(parts):
        for name in ("soft", "nothing ahead"):
            own, *others = found[name]
            torch.testing.assert_close(own, losses[rank::2], atol=1e-5, rtol=0)
            torch.testing.assert_close(others, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_parts(parts: list[dict[str, Any]], name: str) -> None:
    model, optimizer = family(name, lambda *made: made)
    density = DensityLoss(model, **OPTIONS["soft"])
    for step in range(2):
        optimizer.zero_grad()
        of_all_ranks(model, density, step, 2)
        optimizer.step()
    wanted = whole_weights(model)
    for found in parts:
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0)


def test_strength_0_changes_no_bit(parts: list[dict[str, Any]]) -> None:
    for found in parts:
        without, silent = found["untouched"]
        assert all(torch.equal(silent[name], without[name]) for name in without)


def test_gradients_reach_weights_that_were_let_go_of(parts: list[dict[str, Any]]) -> None:
    model, optimizer = model_and_optimizer(None, torch.float32)
    density = DensityLoss(model, **ALONE)
    for rank in range(2):
        with as_rank(rank):
            (density(*batch(0, rank, 9), step=0).loss / 2).backward()
    optimizer.step()
    for found in parts:
        torch.testing.assert_close(found["term alone"], whole_weights(model), atol=1e-5, rtol=0)


def test_processes_may_read_another_number_of_exits(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        with as_rank(rank):
            wanted = uneven(rank, model_and_optimizer(None, torch.float32)[0])
        torch.testing.assert_close(found["uneven"], wanted, atol=1e-5, rtol=0)


def test_the_backward_pass_lets_go_of_weights(parts: list[dict[str, Any]]) -> None:
    """As without the term, but for the embedding, which DeepSpeed keeps, once for each forward."""
    whole = tiny_model("llama", num_hidden_layers=8)
    one = whole.lm_head.weight.numel() / sum(each.numel() for each in whole.parameters())
    for found in parts:
        without, *with_term = found["whole in the backward pass"]
        assert max(with_term) <= without + 1.01 * one


def test_what_is_wrong_on_one_is_said_by_both(parts: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(parts):
        said = found["wrong on one"]
        assert said["wrong_mask"].startswith("InvalidInputError: ")
        assert said["not_finite"].startswith("NonFiniteError: ")
        assert ("process 1" in said["wrong_mask"]) == (rank == 0)


def test_a_model_in_parts_is_measured_as_a_whole_one(parts: list[dict[str, Any]]) -> None:
    whole = model_and_optimizer(None, torch.float32)[0]
    wanted = density_curve(whole, *batch(0, 0, 1)).total_variation
    for found in parts:
        torch.testing.assert_close(found["curve"], wanted, atol=1e-5, rtol=0, equal_nan=True)


def test_what_cannot_be_is_refused(parts: list[dict[str, Any]]) -> None:
    for found in parts:
        said = found["refusals"]
        assert "is not the model that deepspeed.initialize was given" in said["inside"]
        assert "found DeepSpeed ZeRO 3 with leaf modules" in said["leaf"]
