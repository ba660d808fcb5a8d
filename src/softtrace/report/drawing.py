"""What all plots share: style, palette, panels, legends and labels.

Colours are Okabe and Ito's, which stay apart under all common kinds of colour blindness; wherever
colour carries meaning, a marker, a line style, a hatch or lightness carries it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from softtrace.errors import InvalidInputError
from softtrace.evaluation.density_file import Density
from softtrace.files import atomic_path
from softtrace.percent import brief_percent
from softtrace.report.phases import Curve, phases_note, shown_phases
from softtrace.report.tables import shorten

MAX_RUNS = 8
"""Number of colours that can be told apart, one for each run."""

Runs = Sequence[tuple[str, Density]]
Array = NDArray[np.float64]


def check_count(runs: Sequence[Any], least: int = 1) -> None:
    """Raise :class:`InvalidInputError` for too few runs, or more than :data:`MAX_RUNS`."""
    if not least <= len(runs) <= MAX_RUNS:
        raise InvalidInputError(f"runs: found {len(runs)}, allowed are {least} to {MAX_RUNS}")


_DPI = 100
_WIDTH = 10.0  # inches: 1000 pixels
_FONT = "DejaVu Sans"  # ships with matplotlib
_STYLE: dict[Any, Any] = {
    "font.family": _FONT,
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.parse_math": False,  # labels are names: a $ is a $
}
# fmt: off
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F6A00",
)
# fmt: on
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_ALL_ALONE = "#F0B84A"  # the light partner of the first colour, where no colour stands for a run
GREY = "#555555"
_TINTS = {"construction": "#E9E9E9", "refinement": "#F7F7F7"}
KIND_NAMES = {
    "attention": "attention",
    "mlp": "MLP",
    "attention_residual": "residual around attention",
    "mlp_residual": "residual around MLP",
}
SIZE_LABEL = "size of the trace (share of all edges, log scale)"


@contextmanager
def style() -> Iterator[None]:
    """Our style on matplotlib's defaults, not on the user's matplotlibrc; restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically; the same numbers give the same bytes."""
    with atomic_path(path) as temporary:
        # Without the name of the software, which has its version in it.
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def new_figure(height: float, columns: Sequence[Sequence[Any]], note: str) -> Figure:
    """A figure of our own (no pyplot, no global state) with a legend below.

    Args:
        height: inches, without the legend.
        columns: of legend handles; empty ones are left out.
        note: above the legend: the kind of attention.
    """
    columns = [column for column in columns if column]
    rows = max(len(column) for column in columns)
    figure = Figure(figsize=(_WIDTH, round(height + 0.22 * rows + 0.4, 2)), layout="constrained")
    # Legends fill column by column, so shorter columns are filled up with nothing.
    handles = [
        handle
        for column in columns
        for handle in (*column, *[Line2D([], [], linestyle="", label=" ")] * (rows - len(column)))
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(columns),
        handlelength=3.2,
        title=printable(note),
        title_fontsize=10,
    )
    return figure


def panels(
    labels: Sequence[str], columns: Sequence[Sequence[Any]], note: str, pad: float = 6
) -> tuple[Figure, list[Axes]]:
    """An axes a label, at most three a row, with common limits and a legend below.

    Args:
        labels: titles of the panels, not shown on a single one.
        columns: of legend handles.
        note: above the legend: the kind of attention.
        pad: points between a panel and its title.
    """
    count = len(labels)
    across = {1: 1, 2: 2, 4: 2}.get(count, 3)
    down = -(-count // across)
    height = 5.0 if count == 1 else 4.2 if down == 1 else 3.1 * down
    figure = new_figure(height, columns, note)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(0, count - across) : count]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    if count > 1:
        figure.set_layout_engine("constrained", wspace=0.06)
        for axes, label in zip(grid, labels, strict=False):
            axes.set_title(shorten(label, 72 // across), fontsize=11, pad=pad)
    return figure, list(grid[:count])


def set_title(figure: Figure, text: str) -> None:
    """Title a figure of panels as single axes are titled: bold, flush left."""
    figure.suptitle(text, x=0.01, ha="left")


def outer_labels(figure: Figure, grid: Sequence[Axes], x: str, y: str) -> None:
    """One y label for all panels, an x label under the lowest of each column."""
    figure.supylabel(y, fontsize=11)
    for axes in grid:
        if axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel(x)


def size_axis(axes: Axes, narrow: bool = False) -> None:
    """A log axis over all trace sizes in per cent; ``narrow`` for fewer ticks."""
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 1)
    ticks = [1e-4, 1e-2, 1] if narrow else [1e-4, 1e-3, 1e-2, 1e-1, 1]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(percent_tick)
    axes.xaxis.set_minor_locator(NullLocator())


def log_percent(axes: Axes) -> None:
    """A log y axis in per cent, without labels between the powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(percent_tick)
    axes.yaxis.set_minor_formatter(NullFormatter())


def shade_phases(axes: Axes, curves: Sequence[Curve]) -> None:
    """Tint the two phases behind a plot over sizes and name them above it, or say it has none.

    Args:
        axes: of the plot.
        curves: that are drawn there, see :func:`~softtrace.report.phases.shown_phases`.
    """
    phases = shown_phases(curves)
    if not phases:
        note = f"no phases shaded: {phases_note(curves)}"
        axes.text(0, 1.01, note, transform=axes.transAxes, va="bottom", fontsize=9, color=GREY)
    for name, (low, high) in phases.items():
        axes.axvspan(low, high, color=_TINTS[name], linewidth=0, zorder=0)
        where = axes.get_xaxis_transform()
        axes.text((low * high) ** 0.5, 1.01, name, transform=where, ha="center", va="bottom")


def percent_tick(share: float, _: float) -> str:
    """A share of 1 as per cent; an axis passes the place of the tick too."""
    return brief_percent(share)


def run_handles(runs: Runs, length: int) -> list[Any]:
    """A legend handle a run; none for a single run, which needs no name."""
    if len(runs) == 1:
        return []
    return [
        Line2D([], [], color=colour, marker=marker, linewidth=2.4, label=shorten(label, length))
        for (label, _), colour, marker in zip(runs, COLOURS, MARKERS, strict=False)
    ]


def group_handles(single: bool) -> list[Any]:
    """Legend handles that tell easy from all tokens; grey where the colours stand for runs."""
    looks = {group: look(0, group, single) for group in ("easy", "all")}
    if not single:
        looks["easy"] |= {"color": GREY, "marker": ""}
        looks["all"] |= {"color": lighter(GREY), "marker": ""}
    return [
        Line2D([], [], label="easy tokens (lowest entropy)", **looks["easy"]),
        Line2D([], [], label="all tokens", **looks["all"]),
    ]


def look(index: int, group: str, single: bool) -> dict[str, Any]:
    """How the line of a run and a group is drawn: easy strong, all lighter and thinner."""
    easy = group == "easy"
    colour = COLOURS[index] if easy else _ALL_ALONE if single else lighter(COLOURS[index])
    return {
        "color": colour,
        "marker": MARKERS[index] if easy else "",
        "markersize": 6,
        "linewidth": 2.4 if easy else 1.6,
        "zorder": 3 if easy else 2,
    }


def array(values: Any) -> Array:
    """JSON's numbers as float64; null becomes NaN, which is not drawn."""
    return np.asarray(values, dtype=np.float64)


def lighter(colour: str, by: float = 0.55) -> tuple[float, float, float]:
    """Mixed with white by this share, or with black by a negative one."""
    target = 1.0 if by > 0 else 0.0
    red, green, blue = (part + (target - part) * abs(by) for part in to_rgb(colour))
    return red, green, blue


def printable(label: str) -> str:
    """``label`` in one line, with "?" for each character that the font lacks (it would warn)."""
    font = get_font(findfont(_FONT))
    return "".join(
        character if font.get_char_index(ord(character)) else "?"
        for character in " ".join(label.split())
    )
