"""The table of ways to measure says what the file says."""

from __future__ import annotations

from softtrace.evaluation.study.sensitivity import CONCLUSIONS
from softtrace.report.sensitivity_table import sensitivity_table
from softtrace.report.tables import COLUMNS


def test_rows_and_what_survives() -> None:
    number = {"value": 0.25, "low": 0.2, "high": 0.3}
    rows = [
        {
            "attention": attention, "norm": "l1", "stand_in": "nothing", "thresholds": "11",
            "models": [dict.fromkeys(("size", "area", "two_phases", "entropy"), number)],
            "holds": {"two_phases": verdict, "entropy": "open"},
        }
        for attention, verdict in (("recorded", "yes"), ("recomputed", "no"), ("kept", "yes"))
    ]  # fmt: skip
    table = sensitivity_table({
        "models": [{"path": "models/a"}], "tokens": 1200, "definitions": rows,
        "data": {"blocks": 3, "block_size": 64, "split": "all"},
        "conclusions": {"two_phases": "there are two phases", "entropy": "entropy says"},
    })  # fmt: skip
    assert "models/a" in table
    assert "1,200 tokens of 3 sequences of 64, all" in table
    assert "there are two phases: yes in 2, no in 1, open in 0 of 3 ways." in table
    assert "entropy says: yes in 0, no in 0, open in 3 of 3 ways." in table
    numbers, answers = [line for line in table.splitlines() if line.startswith("recomputed")]
    assert numbers.split() == [
        "recomputed", "l1", "nothing", "11", "25.0", "%", "0.250", "+0.25", "(+0.20", "to",
        "+0.30)",
    ]  # fmt: skip
    assert answers.split() == ["recomputed", "l1", "nothing", "11", "no", "open"]


def test_it_fits_a_terminal() -> None:
    """The widest that each column can be, and names that are long."""
    number = {"value": 4e-5, "low": -0.2, "high": -0.1}
    row = {
        "attention": "recomputed", "norm": "ifr", "stand_in": "nothing", "thresholds": "11",
        "models": 2 * [dict.fromkeys(("size", "area", "two_phases", "entropy"), number)],
        "holds": dict.fromkeys(CONCLUSIONS, "open"),
    }  # fmt: skip
    table = sensitivity_table({
        "models": 2 * [{"path": "some/folder/of/models/a-model-of-a-long-name"}], "tokens": 123456,
        "definitions": [row], "conclusions": CONCLUSIONS,
        "data": {"blocks": 3000, "block_size": 1024, "split": "held out, share 0.05"},
    })  # fmt: skip
    assert "0.0040 %" in table
    assert max(map(len, table.splitlines())) <= COLUMNS
