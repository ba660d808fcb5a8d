"""Methods at equal held-out loss: which runs are read, and where on the line between them."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.benchmarks.comparison.equal_loss import PEERS, TERM, at_budget, method_of
from recipes.benchmarks.comparison.real_ways import PEERS as WAYS_OF_PEERS
from recipes.benchmarks.comparison.real_ways import WAYS

KINDS = ("model", "blocks")


def run(method: str, over: float, area: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A run whose loss lies so many per cent above that of plain fine-tuning, 2 nats."""
    return {
        "model": "m", "blocks": None, "method": method, "strength": 1.0, "seed": seed,
        "loss": 2 * (1 + over / 100), "256 recomputed": {"area_easy": area},
        "256 recorded": {"area_easy": 0.0}, **changes,
    }  # fmt: skip


def read(*runs: dict[str, Any]) -> dict[str, Any]:
    (row,) = at_budget([run("plain", 0, 0.6), run("plain", 0, 0.8, seed=1), *runs], KINDS)
    return row


def test_a_method_is_read_on_the_line_to_plain_fine_tuning() -> None:
    row = read(run("layerskip, 0.05", 4, 0.2))
    assert row["method"] == "layerskip"
    assert (row["seeds"], row["reached"]) == (1, 1)
    assert row["between"] == ["layerskip, 0.05", "plain"]
    assert row["loss"]["mean"] == pytest.approx(1.01)
    assert row["256 recomputed"]["area_easy"]["mean"] == pytest.approx(0.5)
    assert "256 recorded" not in row
    assert (row["model"], row["blocks"]) == ("m", None)


def test_the_two_nearest_are_read_whatever_their_strength() -> None:
    row = read(
        run("balanced, 0.15", 0.5, 0.4), run("balanced", 1.5, 0.2), run("balanced, 0.2", 3, 0.0),
        run("balanced, 1", 1.1, 9.0), run("balanced, exits 0.1", 1.1, 9.0),
    )  # fmt: skip
    assert row["between"] == ["balanced", "balanced, 0.15"]
    assert row["256 recomputed"]["area_easy"]["mean"] == pytest.approx(0.3)


def test_a_method_that_is_too_weak_stands_with_its_strongest_run() -> None:
    row = read(run("activation L1, 2", 0.1, 0.6), run("activation L1, 20", 0.4, 0.5))
    assert (row["seeds"], row["reached"], row["between"]) == (1, 0, ["activation L1, 20"])
    assert row["loss"]["mean"] == pytest.approx(1.004)
    assert row["256 recomputed"]["area_easy"]["mean"] == 0.5


def test_seeds_are_read_by_themselves() -> None:
    row = read(run("soft", 2, 0.2), run("soft", 4, 0.4, seed=1))
    assert (row["seeds"], row["reached"]) == (2, 2)
    area = row["256 recomputed"]["area_easy"]
    assert [area[of] for of in ("min", "mean", "max")] == pytest.approx([0.4, 0.55, 0.7])


def test_a_seed_may_be_too_weak_where_another_is_not() -> None:
    row = read(run("soft", 2, 0.2), run("soft", 0.8, 0.3, seed=1))
    assert (row["seeds"], row["reached"], row["between"]) == (2, 1, ["plain", "soft"])
    assert row["loss"] == pytest.approx({"mean": 1.009, "min": 1.008, "max": 1.01})


def test_seeds_without_the_ways_of_others_are_left_out() -> None:
    weak = [run("sparse", 0.5, 0.4, seed=seed) for seed in (0, 1)]
    row = read(*weak, run("sparse, 1", 1.5, 0.2))
    assert (row["seeds"], row["between"]) == (1, ["sparse", "sparse, 1"])
    assert row["256 recomputed"]["area_easy"]["mean"] == pytest.approx(0.3)
    # One that nothing is read of is not missed.
    far = [run("sparse, 1", 1.5, 0.2, seed=seed) for seed in (0, 1)]
    assert read(*weak, *far, run("sparse, 3", 9, 0.0))["seeds"] == 2


def test_repeats_count_as_one() -> None:
    row = read(run("plain", 2, 0.2), run("decode", 3.02, 0.2), run("decode", 3.02, 0.6))
    assert row["between"] == ["decode", "plain"]  # of which the mean costs 1 % more here, 2.02 nats
    assert row["256 recomputed"]["area_easy"]["mean"] == pytest.approx(0.4, abs=1e-4)


def test_runs_on_other_blocks_and_of_other_methods_are_not_read() -> None:
    plain = run("plain", 0, 0.6)
    assert at_budget([plain, run("soft", 2, 0.2, blocks="other")], KINDS) == []
    assert at_budget([plain, run("balanced, by distortion", 2, 0.2)], KINDS) == []
    assert at_budget([plain, run("soft", 2, 0.2, seed=1)], KINDS) == []


def test_names_lose_their_strength_alone() -> None:
    assert method_of("layerskip, 0.05, no dropout") == "layerskip, no dropout"
    assert method_of("balanced, budget 0.01") == "balanced, budget 0.01"
    assert {method_of(way) for way in WAYS_OF_PEERS} == set(PEERS)
    assert set(TERM) <= set(WAYS)
