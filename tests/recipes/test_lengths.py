"""The script that measures how memory and time grow with the length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.benchmarks.speed import lengths
from recipes.benchmarks.speed.outcome import outcome

pytestmark = pytest.mark.thorough


def rows_of(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> list[dict[str, Any]]:
    """What the script leaves, run with a tiny model."""
    command = ["lengths", "--device", "cpu", "--models", "tiny", "--out", str(out), *options]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(lengths, "ENOUGH", 0.0)  # one call each
    monkeypatch.setattr(lengths, "IN_TURN", 0.0)
    if "--only" in options:  # drawing takes longer than what is measured
        monkeypatch.setattr(lengths, "plot", lambda rows, path: None)
    lengths.main()
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def test_what_was_measured_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lengths.json"
    first = rows_of(monkeypatch, out, "--lengths", "64", "--only", "forward")
    rows = rows_of(monkeypatch, out, "--lengths", "64", "--only", *lengths.MEASURED)
    assert rows[0] == first[0]
    assert [(row["length"], row["what"]) for row in rows] == [
        (64, what) for what in lengths.MEASURED
    ]
    assert all(row["peak_gib"] > 0 and row["seconds"] > 0 for row in rows)
    assert all({"created", "command", "versions", "hardware"} < set(row) for row in rows)
    assert rows[0]["command"] != rows[1]["command"]
    assert [row["what"] for row in rows if row.get("masked_runs") == 11] == [
        what for what in lengths.MEASURED if "curve" in what
    ]
    assert all(row["over_masked_runs"] > 1 for row in rows if "masked_runs" in row)
    again = rows_of(monkeypatch, out, "--lengths", "64", "--only", "forward", "--again")
    assert again[1:] == rows[1:]
    assert again[0] != rows[0]


def test_the_plot_shows_all_devices(tmp_path: Path) -> None:
    rows = [
        {"model": "tiny", "device": device, "length": length, "what": what,
         "seconds": 1.0, "peak_gib": 2.0, "held_gib": 1.0}
        for device in ("CPU", "GPU") for length in (64, 96) for what in ("forward", "trace")
    ]  # fmt: skip
    assert lengths.over_forward(rows[1], rows) == 0.5
    failed = {"model": "tiny", "device": "CPU", "length": 512, "what": "trace", "error": "memory"}
    lengths.plot([*rows, failed], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000


@pytest.mark.parametrize("what", lengths.RATIOS)
def test_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    out = tmp_path / "lengths.json"
    (row,) = rows_of(monkeypatch, out, "--only", what, "--limit", "40", "--lengths")
    assert "error" not in row
    found = {
        "evaluate": lambda: row["curves"]["over_masked_runs"],
        "literal": lambda: row["times_extrapolated"],
        "training": lambda: row["whole rows"]["over_plain"]["median"],
    }[what]()
    assert found > 1
    if what == "training":
        assert "_scaled_dot_product_flash_attention_for_cpu" in row["attention of plain"]


def test_a_result_that_does_not_fit_is_told() -> None:
    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert outcome(full, 10) == {"error": "out of memory"}


def test_a_row_that_takes_too_long_is_given_up() -> None:
    def endless() -> dict[str, Any]:
        while True:
            torch.ones(1)

    assert outcome(endless, 0.05) == {"error": "not done in 0.05 s"}


def test_an_error_ends_its_row_alone() -> None:
    def wrong() -> dict[str, Any]:
        raise ValueError("this way")

    assert outcome(wrong, 10) == {"error": "ValueError: this way"}
