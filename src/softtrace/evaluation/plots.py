"""The plots of one or several ``density.json``, drawn the same way on every machine.

Colours are Okabe and Ito's, which stay apart under all common kinds of colour blindness; wherever
colour carries meaning, a marker, a line style, a hatch or lightness carries it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from softtrace.errors import InvalidInputError
from softtrace.evaluation.files import atomic_path
from softtrace.evaluation.table import Density, percent

MAX_RUNS = 8
"""As many runs as there are colours that can be told apart."""

Runs = Sequence[tuple[str, Density]]
Array = NDArray[np.float64]

_DPI = 100
_WIDTH = 10.0  # inches: 1000 pixels
_FONT = "DejaVu Sans"  # ships with matplotlib
_STYLE = {
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
}
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#7F6A00",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#555555"
_PHASES = (("construction", 1e-4, 1e-2, "#E9E9E9"), ("refinement", 1e-2, 1.0, "#F7F7F7"))
_BASELINES = {
    "random_connected": ("random edges", "#777777"),
    "inverse": ("least important first", "#222222"),
}
_RESIDUAL = {
    "residual_kept": ("residual edges kept", (5, 2)),
    "residual_not_kept": ("residual edges not kept", (1, 1.5)),
}
_DEPTHS = ("first quarter of the layers", "second", "third", "last quarter")


def write_plots(runs: Runs, folder: Path | str) -> list[Path]:
    """Draw all plots of these runs into an existing folder, each PNG atomically.

    Args:
        runs: label and content of each ``density.json``, 1 to :data:`MAX_RUNS`; with several, the
            baselines are those of the first run that has them.
        folder: gets ``tv_over_size.png``, ``size_against_entropy.png``, ``edges_over_size.png``
            (unless no run counted its edges) and ``early_exit_agreement.png``.

    Returns:
        The paths that were written.

    Raises:
        InvalidInputError: no run, or too many.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise InvalidInputError(f"runs: found {len(runs)}, allowed are 1 to {MAX_RUNS}")
    written = []
    with _style():
        shown = [(_printable(label), density) for label, density in runs]
        for name, draw in _PLOTS.items():
            figure = draw(shown)
            if figure is not None:
                path = Path(folder) / f"{name}.png"
                with atomic_path(path) as temporary:
                    figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
                written.append(path)
    return written


def _tv_over_size(runs: Runs) -> Figure:
    figure = _figure(6.4)
    axes = figure.add_subplot()
    _phases(axes)
    single = len(runs) == 1
    baselines = next((d["curve"]["baselines"] for _, d in runs if d["curve"]["baselines"]), None)
    for kind, (_, colour) in _BASELINES.items() if baselines else ():
        for residual, (_, dashes) in _RESIDUAL.items():
            line = axes.plot(
                runs[0][1]["curve"]["sizes"], _array(baselines[kind][residual]), color=colour
            )[0]
            line.set(dashes=dashes, linewidth=1.4)
    for index, (_, density) in enumerate(runs):
        colour, sizes = _COLOURS[index], density["curve"]["sizes"]
        for group in ("all", "easy"):
            curve = density["curve"][group]
            shade = colour if group == "easy" else _lighter(colour)
            if single:
                low, high = _array(curve["q25"]), _array(curve["q75"])
                axes.fill_between(sizes, low, high, color=shade, alpha=0.25, linewidth=0)
            marker = _MARKERS[index] if group == "easy" else None
            axes.plot(
                sizes,
                _array(curve["mean"]),
                color=shade,
                marker=marker,
                markevery=(index % 5, 5),
                markersize=6,
                linewidth=2.4 if group == "easy" else 1.6,
            )
    axes.set(
        ylim=(0, 1),
        ylabel="total variation from the full prediction\n(0: the same, 1: nothing in common)",
        title="How far the prediction is off when only the most important edges are kept",
    )
    _size_axis(axes)
    handles = _run_handles(runs)
    handles += _group_handles(_COLOURS[0] if single else _GREY, _MARKERS[0] if single else "")
    if single:
        handles.append(Patch(color=_lighter(_COLOURS[0]), label="middle half of the tokens"))
    for kind, (name, colour) in _BASELINES.items() if baselines else ():
        for residual, (suffix, dashes) in _RESIDUAL.items():
            line = Line2D([], [], color=colour, linewidth=1.4, label=f"{name}, {suffix}")
            line.set_dashes(dashes)
            handles.append(line)
    _legend(figure, handles)
    return figure


def _size_against_entropy(runs: Runs) -> Figure:
    figure, grid = _panels(len(runs), 5.6 if len(runs) == 1 else 4.2)
    figure.suptitle("Edges a token needs, against how uncertain the model is", x=0.01, ha="left")
    points = [
        (_array(d["scatter"]["entropy"]), _array(d["scatter"]["size_at_tv_0.2"])) for _, d in runs
    ]
    # An empty trace can be enough; a log axis has no 0, so it stands at the smallest other size.
    positive = np.concatenate([sizes[sizes > 0] for _, sizes in points])
    floor = float(positive.min()) if len(positive) else 1e-4
    points = [(entropy, np.maximum(sizes, floor)) for entropy, sizes in points]
    first = _binned_medians(*points[0])
    for index, (axes, (label, density)) in enumerate(zip(grid, runs, strict=True)):
        colour = _COLOURS[index]
        axes.set_yscale("log")
        for bound, text, align in (
            (density["easy"]["entropy_bound"], "easy ", "right"),
            (density["hard"]["entropy_bound"], " hard", "left"),
        ):
            axes.axvline(bound, color=_GREY, linewidth=0.8, linestyle=":")
            where = axes.get_xaxis_transform()
            axes.text(bound, 1.0, text, transform=where, ha=align, va="bottom", fontsize=9)
        axes.scatter(*points[index], s=6, color=_lighter(colour), linewidths=0, rasterized=True)
        if index:
            axes.plot(*first, color=_GREY, linewidth=1.6, linestyle="--")
        axes.plot(
            *_binned_medians(*points[index]), color=colour, marker=_MARKERS[index], linewidth=2.2
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        correlation = density["entropy_spearman"]["size_at_tv_0.2"]
        note = "n/a" if correlation is None else f"{correlation:+.2f}"
        axes.set_title(f"{label}\n" if len(runs) > 1 else " ", fontsize=11)
        axes.annotate(f"rank correlation {note}", (0.98, 0.03), xycoords="axes fraction", ha="right")
    _outer_labels(
        figure,
        "entropy of the full model's prediction (nats)",
        "edges needed for total variation 0.2\n(share of all edges, log scale)",
    )
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color="#AAAAAA", label="one token"),
        Line2D([], [], color=_GREY, marker="o", linewidth=2.2, label="median of equally many tokens"),
    ]
    if len(runs) > 1:
        label = f"the medians of {_clip(runs[0][0])}"
        handles.append(Line2D([], [], color=_GREY, linestyle="--", label=label))
    _legend(figure, handles)
    return figure


def _early_exit_agreement(runs: Runs) -> Figure:
    figure = _figure(5.6)
    axes = figure.add_subplot()
    single = len(runs) == 1
    deepest = 1
    for index, (_, density) in enumerate(runs):
        exits, colour = density["early_exit"], _COLOURS[index]
        deepest = max(deepest, *exits["layers"])
        for group in ("all", "easy"):
            easy = group == "easy"
            axes.plot(
                exits["layers"],
                100 * _array(exits["agreement"][group]),
                color=colour if easy else _lighter(colour),
                marker=_MARKERS[index],
                markersize=7 if easy else 4,
                linewidth=2.4 if easy else 1.6,
            )
    axes.set(
        xlim=(0.8, deepest + 0.2),
        ylim=(0, 103),
        xlabel="layers run before the exit",
        ylabel="tokens with the same most likely next token\nas the full model (%)",
        title="How often stopping early gives the full model's prediction",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#E0E0E0", linewidth=0.8)
    axes.set_axisbelow(True)
    handles = _run_handles(runs)
    handles += _group_handles(_COLOURS[0] if single else _GREY, _MARKERS[0] if single else "")
    _legend(figure, handles)
    return figure
