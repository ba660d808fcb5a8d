"""The page of plots of ``on_real_models.py`` can be read without its colours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.benchmarks.comparison.real_model_plots import LENGTHS, MEASURES, drawn, plot
from recipes.benchmarks.places import RESULTS


@pytest.mark.thorough
def test_every_point_says_which_way_to_train_it_is() -> None:
    table = json.loads((RESULTS / "on_real_models.json").read_text("utf-8"))["table"]
    figure = drawn(table)
    (legend,) = figure.legends
    ways, lengths = {}, []
    for text in legend.get_texts():
        number, name = text.get_text().split(" ", 1)
        if name == "tokens":
            lengths.append(int(number))
        else:
            ways[number] = name
    assert lengths == list(LENGTHS)
    assert len(set(ways.values())) == len(ways) > 25
    assert len(set(LENGTHS.values())) == len(LENGTHS)  # shapes
    assert len(figure.axes) % len(MEASURES) == 0
    for panel in figure.axes:
        marks = [line for line in panel.lines if line.get_marker() in LENGTHS.values()]
        points = [(*line.get_xydata()[0], line.get_marker()) for line in marks]
        assert len(points) == len(panel.texts)
        for line, text in zip(marks, panel.texts, strict=True):
            assert ways[text.get_text()]
            assert tuple(line.get_xydata()[0]) == text.xy
            assert line.get_zorder() == text.get_zorder()


def test_the_page_is_written(tmp_path: Path) -> None:
    table = json.loads((RESULTS / "on_real_models.json").read_text("utf-8"))["table"]
    few = [row for row in table if (row["text"], row["steps"]) == ("chat", 1000)]
    plot(few, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
