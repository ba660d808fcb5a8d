"""The page of plots of a ``generation.json``: densities along a model's own text, by who wrote.

Who wrote is told apart by colour and marker, models by line style.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softtrace.report import drawing
from softtrace.report.drawing import COLOURS, GREY, MARKERS
from softtrace.report.study_plots import LINES, draw_page, each_model
from softtrace.report.study_tables import Study

_NAMES = {"text": "the text", "greedy": "the model, greedily", "sampled": "the model, sampled"}


def draw_generation(found: Study) -> Figure:
    """The page, six panels; to be called within :func:`softtrace.report.drawing.style`."""
    return draw_page(found, _PANELS, 12.0, "Along a model's own text")


def _along(key: str, label: str, *, log: bool = False) -> Callable[[Axes, Study], None]:
    """A panel of one number over the new tokens."""

    def draw(axes: Axes, found: Study) -> None:
        bins, writers = found["axes"]["bins"], found["axes"]["writers"]
        x = [(first + last) / 2 for first, last in bins]
        handles = []
        for index, writer in enumerate(writers):
            colour, marker = COLOURS[index], MARKERS[index]
            for at, ends in each_model(found, f"along/{key}"):
                low, value, high = (ends[end][:, index] for end in ("low", "value", "high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(x, value, color=colour, marker=marker, linestyle=LINES[at % len(LINES)],
                          linewidth=1.8, markersize=5)  # fmt: skip
            handles.append(Line2D([], [], color=colour, marker=marker, label=_NAMES[writer]))
        axes.legend(handles=handles, fontsize=9)
        axes.set(xlabel="new tokens since the prompt", ylabel=label)
        if log:
            drawing.log_percent(axes)

    return draw


def _correlations(axes: Axes, found: Study) -> None:
    writers, count = found["axes"]["writers"], len(found["models"])
    keys = ("overall/area_entropy", "order/neighbours", "order/position")
    names = ("area and\nentropy", "area and\nthe next token's", "area and tokens\nsince the prompt")
    for row, key in enumerate(keys):
        for at, ends in each_model(found, key):
            for index in range(len(writers)):
                height = row + 0.2 * (index - 1) + 0.06 * (at - (count - 1) / 2)
                low, value, high = (float(ends[end][index]) for end in ("low", "value", "high"))
                axes.plot([low, high], [height, height], color=COLOURS[index],
                          linestyle=LINES[at % len(LINES)], linewidth=1.4)  # fmt: skip
                axes.plot([value], [height], color=COLOURS[index], marker=MARKERS[index])
    axes.set_yticks(range(len(keys)), names)
    axes.set(ylim=(len(keys) - 0.5, -0.5), xlabel="rank correlation")
    axes.axvline(0, color=GREY, linewidth=0.8)


_PANELS = (
    ("Area under distortion", _along("area", "area")),
    ("Edges needed", _along("size", "share of all (median at TV 0.2)", log=True)),
    ("Entropy of the prediction", _along("entropy", "nats")),
    ("Loss of the token that was written", _along("loss", "nats")),
    ("Area and entropy", _along("area_entropy", "rank correlation")),
    ("Rank correlations over all new tokens", _correlations),
)
