"""The page of plots: what each panel shows, and that it can be told apart without colour."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softtrace.density.curve import PHASES
from softtrace.report.drawing import style
from softtrace.report.study_plots import draw_study, write_page
from tests.report.test_plots import png_size
from tests.support.studies import synthetic_study


def page(models: int) -> Figure:
    with style():
        return draw_study(synthetic_study(models))


def panel(figure: Figure, title: str) -> Axes:
    found = [axes for axes in figure.axes if axes.get_title("left").startswith(title)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("models", [1, 2])
def test_a_page_of_twelve_panels(models: int) -> None:
    figure = page(models)
    assert len(figure.axes) == 12
    for axes in figure.axes:
        assert axes.get_xlabel()
        # rows of correlations name themselves
        assert axes.get_ylabel() or axes.get_title("left").startswith("Computation against")


@pytest.mark.thorough
def test_the_same_numbers_give_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    first = write_page(draw_study, synthetic_study(), tmp_path / "one" / "study.png")
    assert [found.name for found in (tmp_path / "one").iterdir()] == ["study.png"]
    assert png_size(first)[0] == 1000
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        second = write_page(draw_study, synthetic_study(), tmp_path / "other" / "study.png")
    assert first.read_bytes() == second.read_bytes()


def test_phases_are_shaded_where_every_model_has_them() -> None:
    study = synthetic_study(2)
    axes = panel(page(2), "By size: how far off")
    assert not axes.patches  # TV of 0.25 at all sizes
    assert axes.texts[0].get_text().startswith("no phases shaded: 0 % of the fall of TV")
    sizes = study["axes"]["sizes"]
    for found in study["results"]["phases/tv"]["models"]:
        found["value"] = [1 - step / (len(sizes) - 1) for step in range(len(sizes))]
    with style():
        axes = panel(draw_study(study), "By size: how far off")
    assert [text.get_text() for text in axes.texts] == list(PHASES)
    assert len(axes.patches) == len(PHASES)


@pytest.mark.parametrize("kind", [None, "recomputed"])
def test_the_page_names_its_kind_of_attention(kind: str | None) -> None:
    study = synthetic_study()
    if kind:
        study["settings"]["attention"] = kind
    with style():
        figure = draw_study(study)
    title = figure.legends[0].get_title().get_text()
    assert title == f"attention {kind or 'recorded'}"  # files from before the choice


def test_models_differ_by_line_style_and_marker() -> None:
    lines = panel(page(2), "By size: how far off").get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert len({line.get_marker() for line in lines}) == 2
    np.testing.assert_allclose(lines[0].get_ydata(), 0.25)
    np.testing.assert_allclose(lines[1].get_ydata(), 0.125)


def test_bands_and_whiskers_are_the_intervals() -> None:
    figure = page(1)
    band = panel(figure, "By size: how far off").collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(0.2), pytest.approx(0.3))
    bars = panel(figure, "The same tokens in windows: area").collections[0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [pytest.approx([0.2, 0.3])] * 2


def test_lines_of_one_panel_differ_by_marker() -> None:
    for title, count in (("By size: kinds", 4), ("By size: how deep", 4)):
        axes = panel(page(1), title)
        lines = axes.get_lines()
        assert len({line.get_marker() for line in lines}) == count
        legend = axes.get_legend()
        assert legend is not None
        assert len({text.get_text() for text in legend.get_texts()}) == count


def test_positions_show_windows_beside_all_that_stands_before() -> None:
    study = synthetic_study()
    values = [[0.1, 0.2, 0.4]] * 3  # window of 16, of 32, all before
    study["results"]["position/size"]["models"][0]["value"] = values
    with style():
        axes = panel(draw_study(study), "By position")
    shown = [
        np.asarray(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata()) == 3
    ]
    levels = sorted({float(line[0]) for line in shown if np.ptp(line) == 0})
    assert 0.2 in levels
    assert 0.4 in levels
    assert 0.1 not in levels
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "window of 32",
        "all tokens before it",
    ]


def test_distance_of_a_prediction_of_nothing_is_drawn() -> None:
    axes = panel(page(1), "Shallow statistics: distance")
    assert [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"] == [
        3.25
    ]


def test_what_is_not_known_is_a_gap() -> None:
    study = synthetic_study()
    for key in ("uncertainty/size_entropy", "overall/loss"):
        study["results"][key]["models"][0] = {"value": None, "low": None, "high": None}
    study["results"]["length/size"]["models"][0] = {e: [None] * 2 for e in ("value", "low", "high")}
    with style():
        figure = draw_study(study)
        figure.draw_without_rendering()
    assert np.isnan(
        panel(figure, "The same tokens in windows: share").get_lines()[0].get_ydata()
    ).all()
