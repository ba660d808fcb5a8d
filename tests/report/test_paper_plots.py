"""The page of the paper's figures: its panels, and that the same numbers give the same bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from softtrace.evaluation.study.paper import read_paper
from softtrace.evaluation.study.paper_answers import AXES, PAPER_ANSWERS, component_results
from softtrace.evaluation.study.results import results_of
from softtrace.report.drawing import style
from softtrace.report.paper_plots import draw_paper
from softtrace.report.study_plots import write_page
from tests.report.test_plots import png_size
from tests.support.tiny import VOCABULARY, tiny_model, tiny_prompt


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    found = read_paper(
        tiny_model("llama"), tiny_prompt(6, batch=3), torch.arange(VOCABULARY),
        attention="recomputed", seed=0, progress=lambda count: None,
    )  # fmt: skip
    return {
        "models": [{"label": "tiny"}],
        "settings": {"attention": "recomputed", "confidence": 0.95},
        "axes": AXES,
        "results": results_of(PAPER_ANSWERS, [found], resamples=10, seed=0),
        "components": [component_results(found, [])],
    }


def several(paper: dict[str, Any], count: int) -> dict[str, Any]:
    many = copy.deepcopy(paper)
    many["models"] = [{"label": f"tiny {at}"} for at in range(count)]
    many["components"] *= count
    for result in many["results"].values():
        result["models"] *= count
    return many


@pytest.mark.parametrize("count", [1, 9])
def test_eight_panels_that_name_their_axes_and_their_kind_of_attention(
    paper: dict[str, Any], count: int
) -> None:
    with style():
        figure = draw_paper(several(paper, count))
    assert len(figure.axes) == 8
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert "attention recomputed" in figure.legends[0].get_title().get_text()
    over_sizes = [axes for axes in figure.axes if "size of the trace" in axes.get_xlabel()]
    assert [axes.get_xlim() for axes in over_sizes] == [(1e-5, 1.0)] * 6


@pytest.mark.thorough
def test_the_same_numbers_give_the_same_bytes(paper: dict[str, Any], tmp_path: Path) -> None:
    first = write_page(draw_paper, paper, tmp_path / "paper.png")
    before = first.read_bytes()
    assert png_size(first)[0] == 1000
    with matplotlib.rc_context({"font.size": 30}):
        assert write_page(draw_paper, paper, first).read_bytes() == before
