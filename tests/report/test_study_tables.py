"""The table of a study: every number with its interval, under the right model."""

from __future__ import annotations

import re

import numpy as np

from softtrace.evaluation.study.readings import STUDY_SIZES
from softtrace.report.study_tables import study_table
from tests.support.studies import synthetic_study


def row(table: str, name: str) -> list[str]:
    """The cells of the row of that name."""
    found = [line for line in table.split("\n") if line.strip().startswith(name)]
    assert len(found) == 1, (name, found)
    return re.split(r" {2,}", found[0].strip())


def group(table: str, name: str, rows: int = 3) -> list[list[str]]:
    """The cells of as many lines from the one that begins with that name."""
    lines = table.split("\n")
    found = [number for number, line in enumerate(lines) if line.startswith(name)]
    assert len(found) == 1, (name, found)
    return [re.split(r" {2,}", line.strip()) for line in lines[found[0] : found[0] + rows]]


def test_one_model() -> None:
    study = synthetic_study()
    study["settings"]["confidence"] = 0.9
    table = study_table(study)
    assert row(table, "loss ") == ["loss", "0.250 (0.200 to 0.300)"]
    name = "edges needed (median size at TV 0.2), window of 16"
    assert row(table, name)[1] == "25.0 % (20.0 % to 30.0 %)"
    assert row(table, "edges needed, entropy")[1] == "+0.25 (+0.20 to +0.30)"
    assert "change" not in table
    assert "1,260 tokens of 20 sequences of 128, held out, share 0.05" in table
    assert "90 % percentile intervals" in table
    said = table.replace("\n", " ")
    assert "2,000 resamples, seed 0" in said
    assert "1,234,567 tokens of the training side, 1 added to every count" in said
    assert max(len(line) for line in table.split("\n")) <= 80  # of a terminal


def test_two_models_and_what_changed() -> None:
    table = study_table(synthetic_study(2))
    assert group(table, "loss ") == [
        ["loss", "plain", "0.250 (0.200 to 0.300)"],
        ["penalty", "0.125 (0.075 to 0.175)"],
        ["change", "-0.125 (-0.175 to -0.075)"],
    ]
    long = group(table, "share of the fall of TV")
    assert [cells[-1] for cells in long] == [
        "25.0 % (20.0 % to 30.0 %)",
        "12.5 % (7.50 % to 17.5 %)",
        "-12.5 % (-17.5 % to -7.50 %)",
    ]
    names = ["share of the fall of TV that comes below", "1 % of the edges", "change"]
    assert [cells[0] for cells in long] == names
    assert "of shares in percentage points." in table
    assert max(len(line) for line in table.split("\n")) <= 80


def test_many_models_of_long_names_fit_a_terminal_too() -> None:
    study = synthetic_study()
    label = "a-model-of-a-name-that-is-far-too-long-for-a-column-{}"
    study["models"] = [{"label": label.format(at), "path": "models/" * 20} for at in range(5)]
    for result in study["results"].values():
        result["models"] *= 5
    table = study_table(study)
    assert len({cells[-2] for cells in group(table, "loss ", 5)}) == 5
    assert "change" not in table
    lines = table.split("\n")
    assert max(len(line) for line in lines if "models/" not in line) <= 80
    assert sum(set(line) == {"-"} for line in lines) == 6


def test_rows_over_sizes_show_the_number_at_their_size() -> None:
    study = synthetic_study()
    for key in ("phases/tv", "shallow/unigram_kl"):
        study["results"][key]["models"][0]["value"] = [float(at) for at in range(25)]
    kinds = np.arange(100.0).reshape(25, 4) / 100
    study["results"]["phases/kinds"]["models"][0]["value"] = kinds.tolist()
    table = study_table(study)
    for name, size in (("0.01 %", 1e-4), ("0.1 %", 1e-3), ("1 %", 1e-2), ("10 %", 1e-1)):
        at = round(float(np.argmin(np.abs(np.log(np.array(STUDY_SIZES) / size)))))
        assert row(table, f"mean TV at {name} ")[1].startswith(f"{at}.000 ")
    assert row(table, "KL from the unigrams at full size")[1].startswith("24.000 ")
    assert row(table, "attention among the edges at 1 %")[1].startswith("48.0 % ")


def test_what_is_not_known_is_said() -> None:
    study = synthetic_study()
    study["results"]["overall/loss"]["models"][0] = {"value": 1.0, "low": None, "high": None}
    assert row(study_table(study), "loss ")[1] == "1.000 (n/a to n/a)"
