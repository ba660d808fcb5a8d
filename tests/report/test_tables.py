"""Tables: the right number under the right head, aligned, explained."""

from __future__ import annotations

import re
from typing import Any

import pytest

from softtrace.density.curve import SIZE_BOUND
from softtrace.report.tables import (
    MEASURES,
    comparison_table,
    density_table,
    half_depth_exit,
    percent,
    ratio,
    shorten,
)
from tests.support.densities import synthetic_density


def cells(table: str, start: str) -> list[str]:
    """The cells of the row that begins with ``start``, without its name."""
    line = next(line for line in table.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_density_table_has_each_number_in_its_column() -> None:
    table = density_table(synthetic_density())
    lines = table.splitlines()
    assert lines[0] == "models/plain (llama, 3.5 M parameters, 4 layers)"
    assert lines[1].startswith("992 tokens, held out, share 0.05, in 32 blocks of 64;")
    assert ["all", "easy", "hard"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= 80  # columns of a terminal
    assert cells(table, "loss (nats/token)") == ["3.000", "1.000", "5.000"]
    assert cells(table, "area under distortion") == ["0.400", "0.300", "0.500"]
    assert cells(table, "edges needed") == ["2.00 %", "0.80 %", "4.00 %"]
    assert cells(table, "early exit after 2 of 4 layers agrees") == ["50.0 %", "80.0 %", "50.0 %"]
    assert "1.50 nats" in table
    assert "4.50 nats" in table


def test_comparison_shows_change_against_the_first_run() -> None:
    plain, soft = synthetic_density("plain"), synthetic_density("soft", factor=0.5)
    soft["loss_nats"]["all"] = 3.03
    soft["early_exit"]["agreement"]["easy"] = [0.4, 0.9, 0.9, 1.0]
    table = comparison_table([("plain", plain), ("soft", soft)])
    assert table.splitlines()[0].split() == ["plain", "soft", "change"]
    assert max(map(len, table.splitlines())) <= 80
    assert cells(table, "held-out loss (nats/token)") == ["3.000", "3.030", "+1.0 %"]
    assert cells(table, "edges needed on easy tokens (median at TV 0.2)") == [
        "0.80 %",
        "0.40 %",
        "-50.0 %",
    ]
    assert cells(table, "area under distortion, easy") == ["0.300", "0.150", "-50.0 %"]
    assert cells(table, "early exit at half depth agrees, easy") == [
        "80.0 %",
        "90.0 %",
        "+12.5 %",
    ]
    assert cells(table, "rank correlation") == ["+0.70", "+0.70"]  # their ratio says nothing


def test_an_unchanged_number_has_no_sign_of_falling() -> None:
    plain, other = synthetic_density(), synthetic_density()
    other["loss_nats"]["all"] = 3.0 * (1 - 1e-9)
    table = comparison_table([("a", plain), ("b", other)])
    assert cells(table, "held-out loss")[-1] == "+0.0 %"
    assert "-0.0 %" not in table


def test_loss_is_called_held_out_only_where_it_is() -> None:
    plain, other = synthetic_density(), synthetic_density()
    other["data"]["split"] = "all"
    table = comparison_table([("a", plain), ("b", other)])
    assert "held-out" not in table
    assert table.splitlines()[2].startswith("loss (nats/token)")


def test_rows_are_aligned_and_long_names_cut() -> None:
    runs = [("plain", synthetic_density()), ("x" * 60 + "-seed1", synthetic_density(factor=0.1))]
    lines = comparison_table(runs).splitlines()
    assert "x" * 10 + "…xxx-seed1" in lines[0]
    width = len(lines[1])
    assert set(lines[1]) == {"-"}
    body = lines[2 : 2 + len(MEASURES)]
    # All rows with a change end in the same column; the last has none.
    assert {len(line) for line in (lines[0], *body[:-1])} == {width}


def test_many_runs_are_spread_over_tables_that_begin_with_the_first() -> None:
    runs = [(f"run{i}", synthetic_density()) for i in range(8)]
    table = comparison_table(runs)
    heads = [line.split() for line in table.splitlines() if line.strip().startswith("run0")]
    assert [[name for name in head if name.startswith("run")] for head in heads] == [
        ["run0", "run1", "run2", "run3"],
        ["run0", "run4", "run5", "run6"],
        ["run0", "run7"],
    ]
    assert max(map(len, table.splitlines())) <= 120


def test_legend_explains_each_measure_and_its_direction() -> None:
    legend = comparison_table([("plain", synthetic_density())]).split("\n\n")[-1]
    for words in ("relative to plain", "Easy, hard", "Edges needed", "Area", "Early exit agrees"):
        assert words in legend
    assert "lower" in legend
    assert "higher" in legend


@pytest.mark.parametrize("make", [density_table, lambda d: comparison_table([("plain", d)])])
def test_tables_say_which_numbers_compare_at_other_lengths(make: Any) -> None:
    density = synthetic_density() | {"min_context": 1024}
    density["data"]["block_size"] = 2048
    legend = " ".join(make(density).split("\n\n")[-1].split())
    assert "only with those of blocks of 2,048 tokens with 1,024 of context" in legend
    assert "Loss, entropy and early exits count no edges." in legend


@pytest.mark.parametrize("kind", ["recorded", "recomputed", "kept"])
def test_tables_name_their_kind_of_attention(kind: str) -> None:
    density = synthetic_density() | {"attention": kind}
    assert f"attention of masked runs {kind}" in density_table(density)
    table = comparison_table([("plain", density), ("soft", density)])
    assert f"\nAttention {kind}: " in table


def test_missing_numbers_are_said_to_be_missing() -> None:
    density = synthetic_density()
    density["entropy_spearman"]["size_at_tv_0.2"] = None
    density["area"]["easy"] = None
    assert cells(density_table(density), "area under distortion") == ["0.400", "n/a", "0.500"]
    table = comparison_table([("plain", density), ("soft", synthetic_density())])
    assert cells(table, "area under distortion, easy") == ["n/a", "0.300", "n/a"]


@pytest.mark.parametrize(("layers", "half"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_half_depth_rounds_down_but_runs_a_layer(layers: int, half: int) -> None:
    density = synthetic_density()
    density["early_exit"]["layers"] = list(range(1, layers + 1))
    assert half_depth_exit(density) == half


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0 %"),
        (1.0, "100.0 %"),
        (0.1, "10.0 %"),
        (0.0102, "1.02 %"),
        (0.0046, "0.46 %"),
        (0.001, "0.10 %"),
        (2e-5, "0.0020 %"),
    ],
)
def test_small_shares_keep_their_digits(share: float, text: str) -> None:
    assert percent(share) == text


def test_ratio_to_nothing_is_none() -> None:
    assert ratio(1.0, 2.0) == 0.5
    assert ratio(1.0, 0.0) is None
    assert ratio(None, 1.0) is None


def test_what_says_tv_says_the_one_that_is_measured() -> None:
    keys = {measure.key for measure in MEASURES}
    assert {f"size_at_tv_{SIZE_BOUND}_{group}" for group in ("easy", "all", "hard")} <= keys
    named = [found[0] for measure in MEASURES if (found := re.search(r"TV [\d.]+", measure.name))]
    assert named == [f"TV {SIZE_BOUND}"] * 3


def test_labels_are_shortened_in_the_middle_where_they_are_too_long() -> None:
    assert shorten("a" * 10 + "b" * 10) == "a" * 10 + "b" * 10
    assert shorten("a" * 11 + "b" * 10) == "a" * 10 + "…" + "b" * 9
