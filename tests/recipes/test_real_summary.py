"""Runs of a few seeds, whose means and ratios can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.benchmarks.comparison.real_summary import table_of


def run(method: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """One run as ``on_real_models train`` leaves it, cut to what a row of the table is made of."""
    kind = {"model": "small", "text": "prose", "lora": False, "steps": 2, "blocks": "a"}
    strength = 0.0 if method == "plain" else 0.35
    return {**kind, "method": method, "strength": strength, "seed": seed, "loss": loss, **more}


def at(area_easy: float, area_hard: float) -> dict[str, Any]:
    return {"256 recomputed": {"area_easy": area_easy, "area_hard": area_hard, "size_hard": 0.5}}


def test_ratios_are_over_the_plain_run_of_the_same_seed_and_the_lowest_loss_that_it_had() -> None:
    rows = table_of([
        run("plain", 0, 2.0, held_out_losses={"1": 1.6, "2": 2.0}, **at(0.8, 0.5)),
        run("plain", 1, 4.0, held_out_losses={"1": 5.0, "2": 4.0}, **at(0.6, 1.0)),
        run("balanced", 1, 5.0, held_out_losses={}, **at(0.2, 0.5)),
        run("balanced", 0, 2.2, **at(0.4, 1.0)),
        run("balanced", 2, 1.0, **at(0.0, 0.0)),  # no plain run has this seed
        run("sparse", 0, 1.0, **at(0.0, 0.0)) | {"blocks": "b"},  # nor these blocks
    ])  # fmt: skip
    plain, balanced = rows
    assert (plain["method"], balanced["method"]) == ("plain", "balanced")
    assert balanced["seeds"] == balanced["runs"] == 2
    assert plain["loss"] == {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert plain["loss over lowest"] == pytest.approx({"mean": 1.125, "min": 1.0, "max": 1.25})
    assert balanced["loss"] == pytest.approx({"mean": 1.175, "min": 1.1, "max": 1.25})
    assert balanced["loss over lowest"] == pytest.approx(
        {"mean": 1.3125, "min": 1.25, "max": 1.375}
    )
    assert balanced["256 recomputed"]["area_easy"]["mean"] == pytest.approx(0.3)
    hard = balanced["hard_over_plain"]["256 recomputed"]["area_hard"]
    assert hard == pytest.approx({"mean": 1.25, "min": 0.5, "max": 2.0})


def test_plain_runs_that_repeat_each_other_count_by_their_mean() -> None:
    rows = table_of([
        run("plain", 0, 1.0, held_out_losses={"2": 1.0}, **at(0.8, 0.5)),
        run("plain", 0, 3.0, **at(0.8, 0.5)),  # of a time before losses were measured on the way
        run("balanced", 0, 3.0, **at(0.4, 0.5)),
    ])  # fmt: skip
    assert [row["runs"] for row in rows] == [2, 1]
    assert rows[1]["loss"]["mean"] == pytest.approx(1.5)
    assert "loss over lowest" not in rows[1]
