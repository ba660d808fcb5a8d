"""The term on models that FSDP2 and FSDP1 sharded, on two and three processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from softtrace import density_curve
from tests.support.tiny import tiny_model
from tests.support.units import WAYS
from tests.support.ways_to_shard import (
    OPTIONS,
    WHOLE_WAYS,
    batch,
    model_and_optimizer,
    of_ranks,
    runs,
    trained,
)

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_ranks(tmp_path_factory.mktemp("two"), 2, *WAYS)


def check_trained(found: list[dict[str, Any]], *ways: str) -> None:
    """Terms, gradients of all steps and weights after them are those of one process with all."""
    ranks = len(found)
    expected = {
        (name, steps): trained(None, OPTIONS[name], steps, 0, ranks)
        for name, steps in {(name, steps) for _, name, steps in runs(ways)}
    }
    for way, name, steps in runs(ways):
        losses, weights, gradients = expected[name, steps]
        for rank, each in enumerate(found):
            own, after, back = each[f"{way}, {name}"]
            torch.testing.assert_close(own, losses[rank::ranks], atol=1e-12, rtol=0)
            assert after.keys() == weights.keys()
            torch.testing.assert_close(after, weights, atol=1e-12, rtol=0)
            torch.testing.assert_close(back, gradients, atol=1e-12, rtol=0)


def test_two_processes_train_as_one(two: list[dict[str, Any]]) -> None:
    check_trained(two, *WAYS)


def test_three_processes_train_as_one(tmp_path: Path) -> None:
    check_trained(of_ranks(tmp_path, 3, "norm and head"), "norm and head")


@pytest.mark.parametrize("way", WHOLE_WAYS)
def test_strength_0_changes_nothing(two: list[dict[str, Any]], way: str) -> None:
    for found in two:
        without, inert = found[f"{way}, untouched"]
        assert torch.equal(without, inert)


@pytest.mark.parametrize("way", WHOLE_WAYS)
def test_accumulated_gradients_are_reduced_once(two: list[dict[str, Any]], way: str) -> None:
    for found in two:
        torch.testing.assert_close(*found[f"{way}, accumulated"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", WHOLE_WAYS)
def test_units_that_compute_in_bfloat16(two: list[dict[str, Any]], way: str) -> None:
    for found in two:
        weights, units = found[f"{way}, in_bfloat16"]
        assert units == pytest.approx(weights, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "allowed"), [("float32 as float64", 1e-5), ("bfloat16 as float32", 0.2)]
)
def test_logits_of_more_digits_than_their_unit_computes_in(
    two: list[dict[str, Any]], name: str, allowed: float
) -> None:
    """MixedPrecisionPolicy(output_dtype=...); what two steps changed is the sum of gradients."""
    before = {key: each.detach() for key, each in model_and_optimizer(None)[0].named_parameters()}
    losses, weights, _ = trained(None, OPTIONS["soft"], 2, 0, 2)
    for rank, found in enumerate(two):
        own, after, _ = found[name]
        torch.testing.assert_close(
            torch.stack(own).double(), torch.stack(losses[rank::2]), rtol=allowed / 10, atol=0
        )
        wanted = torch.cat([(weights[key] - before[key]).flatten() for key in weights])
        changed = torch.cat([(after[key] - before[key]).flatten() for key in weights])
        assert (changed - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.parametrize("way", WHOLE_WAYS)
def test_a_curve_is_that_of_the_whole_model(two: list[dict[str, Any]], way: str) -> None:
    model = tiny_model("llama", seed=1, dtype=torch.float64)
    wanted = density_curve(model, *batch(0, 0, 1)).total_variation
    for found in two:
        torch.testing.assert_close(
            found[f"{way}, curve"], wanted, atol=1e-12, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize("way", WHOLE_WAYS)
def test_what_is_wrong_on_one_process_is_said_by_all(two: list[dict[str, Any]], way: str) -> None:
    first, second = (found[f"{way}, wrong_on_one"] for found in two)
    for name, words in (("wrong_mask", "values other than 0 and 1"), ("not_finite", "infinite")):
        assert words in second[name]
        assert "process 1 (of 0 to 1) failed" in first[name]
        assert words in first[name]


def test_units_that_cannot_be_are_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        said = found["refusals"]
        assert "call it on layers and then on the model" in said["unit_around"]
        assert "Call fully_shard on every layer" in said["let_go_after_forward"]
        assert "Let auto_wrap_policy wrap layers only" in said["flat_head"]
        assert "pass what FullyShardedDataParallel(model) returned" in said["flat_inside"]


def test_fsdp1_may_wrap_the_model_after_the_term_was_made(two: list[dict[str, Any]]) -> None:
    losses, *_ = trained(None, OPTIONS["soft"], 1, 0, 2)
    for rank, found in enumerate(two):
        torch.testing.assert_close(found["wrapped later"], losses[rank], atol=1e-12, rtol=0)
