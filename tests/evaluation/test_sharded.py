"""Importances, curves and measurements of models in parts are those of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ways_to_measure import MEASURES, gradient, of_ranks, whole_model

pytestmark = pytest.mark.thorough

#: a head that is let go, parts of layers, and FSDP1
WAYS = ("norm and head, let go", "by half layer", "flat")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_ranks(tmp_path_factory.mktemp("two"), 2, *WAYS)


@pytest.fixture(scope="module")
def wanted() -> list[dict[str, Any]]:
    """What one process finds of the whole model, with the tokens of each."""
    model = whole_model()
    return [{each.__name__: each(model, rank) for each in MEASURES} for rank in range(2)]


def check(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", [each.__name__ for each in MEASURES])
@pytest.mark.parametrize("way", WAYS)
def test_each_process_has_the_numbers_of_its_own_tokens(
    two: list[dict[str, Any]], wanted: list[dict[str, Any]], way: str, name: str
) -> None:
    for found, expected in zip(two, wanted, strict=True):
        check(found[way][name], expected[name])


@pytest.mark.parametrize("way", WAYS[:2])
def test_gradients_of_importances_are_means_over_processes(
    two: list[dict[str, Any]], way: str
) -> None:
    by_rank: list[dict[str, Tensor]] = [gradient(whole_model(), rank) for rank in range(2)]
    assert any(each.abs().max() > 1e-3 for each in by_rank[0].values())
    for found in two:
        own = found[way]["gradient"]
        for name, each in by_rank[0].items():
            check(own[name], (each + by_rank[1][name]) / 2)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_on_one_process_is_said_by_all(two: list[dict[str, Any]], way: str) -> None:
    first, second = (found[way]["wrong"] for found in two)
    assert first.keys() == second.keys()
    assert second.keys() == {"wrong_mask", "wrong_ids", "wrong_block", "wrong_between"}
    for name, said in second.items():
        kind, _, words = said.partition(": ")
        assert first[name] == f"{kind}: process 1 (of 0 to 1) failed: {words}"
