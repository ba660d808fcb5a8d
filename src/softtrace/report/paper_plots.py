"""The page of plots of a ``paper.json``: the figures of arXiv 2605.27033, of one's own models."""

from __future__ import annotations

import math

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from softtrace.percent import brief_percent
from softtrace.report import drawing
from softtrace.report.drawing import COLOURS, GREY, MARKERS
from softtrace.report.paper_table import Paper
from softtrace.report.study_plots import (
    LINES,
    band,
    colour_of,
    draw_page,
    each_model,
    several,
)
from softtrace.report.tables import shorten

_TICKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1)


def draw_paper(paper: Paper) -> Figure:
    """The page, eight panels; to be called within :func:`softtrace.report.drawing.style`."""
    return draw_page(paper, _PANELS, 15.5, "By the definitions of arXiv 2605.27033")


def _variation(axes: Axes, paper: Paper) -> None:
    handles = []
    names = {"trace": "trace", "inverse": "model without it", "random": "random subgraph"}
    for index, (key, name) in enumerate(names.items()):
        colour, marker = COLOURS[index], MARKERS[index]
        for at, ends in each_model(paper, f"tv/{key}"):
            band(axes, paper, at, ends, colour, marker, offset=index)
        handles.append(Line2D([], [], color=colour, marker=marker, label=name))
    axes.legend(handles=handles, fontsize=9)
    axes.set(ylim=(0, 1), ylabel="mean TV from the full prediction")
    _all_sizes(axes)


def _nucleus(axes: Axes, paper: Paper) -> None:
    targets = paper["axes"]["nucleus_k"]
    count, least = len(paper["models"]), 1.0
    for at, ends in each_model(paper, "nucleus"):
        low, middle, high = ends["value"].T
        x = [place + 0.1 * (at - (count - 1) / 2) for place in range(len(targets))]
        least = min(least, float(low.min()))
        colour = colour_of(at)
        axes.errorbar(x, middle, yerr=(middle - low, high - middle), color=colour, capsize=3,
                      marker=MARKERS[at % len(MARKERS)], linestyle=LINES[at % len(LINES)],
                      linewidth=1.8, elinewidth=1)  # fmt: skip
    drawing.log_percent(axes)
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.set_ylim(10 ** math.floor(math.log10(max(least, 1e-5) * 0.999)), 1.2)
    axes.set_xticks(range(len(targets)), [str(k) for k in targets])
    axes.set(xlabel="k (%)", ylabel="first size with ν ≥ k (quartiles)")


def _kinds(axes: Axes, paper: Paper) -> None:
    names = ["attention", "MLP", "residual"]
    several(axes, paper, "kinds", range(3), names)
    axes.set_ylabel("edges of the trace (%)")
    _all_sizes(axes)


def _depths(axes: Axes, paper: Paper) -> None:
    names = [f"{name} layers" for name in ("initial", "early-mid", "late-mid", "last")]
    several(axes, paper, "depths", range(4), names)
    axes.set_ylabel("edges of the trace (%)")
    _all_sizes(axes)


def _frequency(axes: Axes, paper: Paper) -> None:
    _single(axes, paper, "frequency")
    axes.set_ylabel("unigram frequency, top-5 nucleus")
    axes.yaxis.set_major_formatter(drawing.percent_tick)
    axes.set_ylim(0, None)


def _lorenz(axes: Axes, paper: Paper) -> None:
    """The last model's curves, dark at small sizes, light at large ones."""
    sizes, found = paper["axes"]["component_sizes"], paper["components"][-1]
    for at, (size, curve) in enumerate(zip(sizes, found["lorenz"], strict=True)):
        if curve is None:  # no trace of that size holds any
            continue
        colour = colormaps["viridis"](0.9 * at / (len(sizes) - 1))
        x = [100 * place / (len(curve) - 1) for place in range(len(curve))]
        axes.plot(x, [100 * y for y in curve], color=colour, linewidth=1.6,
                  label=brief_percent(size))  # fmt: skip
    axes.plot((0, 100), (0, 100), color=GREY, linewidth=1, linestyle=":")
    label = shorten(drawing.printable(paper["models"][-1]["label"]), 22)
    axes.legend(fontsize=8, loc="lower right", title=f"{label}, size", title_fontsize=8)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="heads and MLPs, most frequent first (%)")
    axes.set_ylabel("their share of all occurrences (%)")


def _loss(axes: Axes, paper: Paper) -> None:
    _single(axes, paper, "true/loss")
    axes.set_ylabel("loss of the true token (nats)")


def _rank(axes: Axes, paper: Paper) -> None:
    _single(axes, paper, "true/rank")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
    axes.set_ylabel("rank of the true token (median)")


_PANELS = (
    ("How far off: trace, rest of the model, random", _variation),
    ("Smallest size for a shared nucleus", _nucleus),
    ("Kinds of edges", _kinds),
    ("How deep the edges lie", _depths),
    ("How frequent the likely tokens are", _frequency),
    ("How unevenly components are used", _lorenz),
    ("Loss of the true token", _loss),
    ("Rank of the true token", _rank),
)


def _single(axes: Axes, paper: Paper, key: str) -> None:
    for at, ends in each_model(paper, key):
        band(axes, paper, at, ends, colour_of(at))
    _all_sizes(axes)


def _all_sizes(axes: Axes) -> None:
    axes.set_xlim(1e-5, 1)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
