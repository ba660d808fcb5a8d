"""The plots of one or several ``density.json``, drawn the same way on every machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from softtrace.report import drawing
from softtrace.report.attention import attention_name, unmasked_note
from softtrace.report.drawing import COLOURS, GREY, MARKERS, SIZE_LABEL, Array, Runs
from softtrace.report.phases import curves_of
from softtrace.report.tables import shorten

_BASELINES = {
    "random_connected": ("random connected edges", "#808080"),
    "inverse": ("least important first", "#222222"),
}
_RESIDUAL = {
    "residual_kept": ("residual kept", (5, 2)),
    "residual_not_kept": ("residual not kept", (1, 1.5)),
}
_KINDS = {
    "attention": ("#0072B2", ""),
    "mlp": ("#D55E00", "///"),
    "attention_residual": ("#999999", "..."),
    "mlp_residual": ("#E6B800", "xxx"),
}
_HATCH_COLOUR = (0.0, 0.0, 0.0, 0.45)
_DEPTHS = {"first": -0.3, "second": 0.1, "third": 0.45, "last": 0.75}  # how much lighter


def write_plots(runs: Runs, folder: Path | str) -> list[Path]:
    """Draw all plots of these runs into an existing folder, each PNG atomically.

    Args:
        runs: label and content of each ``density.json``, 1 to ``MAX_RUNS`` of ``drawing``; with
            several, the baselines are those of the first run that has them.
        folder: gets ``tv_over_size.png``, ``size_against_entropy.png``, ``edges_over_size.png``
            (unless no run counted its edges) and ``early_exit_agreement.png``.

    Returns:
        The paths that were written.

    Raises:
        InvalidInputError: no run, or too many.
    """
    drawing.check_count(runs)
    written = []
    with drawing.style():
        shown = [(drawing.printable(label), density) for label, density in runs]
        for name, draw in _PLOTS.items():
            figure = draw(shown)
            if figure is not None:
                written.append(drawing.save(figure, Path(folder) / f"{name}.png"))
    return written


def _tv_over_size(runs: Runs) -> Figure:
    drawn = [density["curve"] for _, density in runs if density["curve"]["baselines"]][:1]
    single = len(runs) == 1
    groups = drawing.group_handles(single)
    if single:
        groups.append(Patch(color=GREY, alpha=0.25, label="middle half of the tokens"))
    references = _baseline_handles() if drawn else []
    if len(runs) <= 4:
        columns = [drawing.run_handles(runs, 28), groups, references]
    else:  # high columns, so two are enough
        columns = [drawing.run_handles(runs, 40), groups + references]
    densities = [density for _, density in runs]
    figure = drawing.new_figure(5.0, columns, attention_name(densities))
    axes = figure.add_subplot()
    drawing.shade_phases(axes, curves_of(densities))
    for curve in drawn:
        for kind, (_, colour) in _BASELINES.items():
            for residual, (_, dashes) in _RESIDUAL.items():
                values = drawing.array(curve["baselines"][kind][residual])
                line = axes.plot(curve["sizes"], values, color=colour, linewidth=1.4)[0]
                line.set_dashes(dashes)
    for index, (_, density) in enumerate(runs):
        sizes = density["curve"]["sizes"]
        for group in ("all", "easy"):
            curve = density["curve"][group]
            look = drawing.look(index, group, single)
            if single:  # several bands would hide each other
                band = drawing.array(curve["q25"]), drawing.array(curve["q75"])
                shade = {"color": look["color"], "alpha": 0.22, "linewidth": 0, "zorder": 1}
                axes.fill_between(sizes, *band, **shade)
            axes.plot(sizes, drawing.array(curve["mean"]), markevery=(index % 5, 5), **look)
    axes.set(
        ylim=(0, 1),
        ylabel="mean total variation from the full prediction\n(0: the same, 1: nothing in common)",
    )
    axes.set_title(
        "How far the prediction is off when only the most important edges are kept", pad=24
    )
    drawing.size_axis(axes)
    axes.set_xlabel(SIZE_LABEL)
    return figure


def _size_against_entropy(runs: Runs) -> Figure:
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=4, color="#AAAAAA", label="one token"),
        Line2D([], [], color=GREY, marker="o", linewidth=2.2, label="median of each twelfth"),
    ]
    if len(runs) > 1:
        label = f"the medians of {shorten(runs[0][0], 40)}"
        handles.append(Line2D([], [], color=GREY, linestyle="--", label=label))
    labels, note = [label for label, _ in runs], attention_name([density for _, density in runs])
    figure, grid = drawing.panels(labels, [[part] for part in handles], note, pad=16)
    drawing.set_title(figure, "How many edges a token needs, by how uncertain the model is")
    points, floor = scatter_points(runs)
    highest = max(float(np.nanmax(sizes, initial=floor)) for _, sizes in points)
    first = binned_medians(*points[0])
    for index, (axes, (_, density)) in enumerate(zip(grid, runs, strict=True)):
        colour = COLOURS[index]
        for bound, text, align in (
            (density["easy"]["entropy_bound"], "← easy ", "right"),
            (density["hard"]["entropy_bound"], " hard →", "left"),
        ):
            axes.axvline(bound, color=GREY, linewidth=0.8, linestyle=":")
            where = axes.get_xaxis_transform()
            axes.text(bound, 1.0, text, transform=where, ha=align, va="bottom", fontsize=9)
        axes.scatter(*points[index], s=6, color=drawing.lighter(colour), linewidths=0)
        if index:
            axes.plot(*first, color=GREY, linewidth=1.6, linestyle="--")
        medians = binned_medians(*points[index])
        axes.plot(*medians, color=colour, marker=MARKERS[index], linewidth=2.2)
        correlation = density["entropy_spearman"]["size_at_tv_0.2"]
        note = "n/a" if correlation is None else f"{correlation:+.2f}"
        axes.annotate(
            f"rank correlation {note}",
            (0.98, 0.03),
            xycoords="axes fraction",
            ha="right",
            fontsize=10,
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
        )
    drawing.log_percent(grid[0])  # shared by all
    if floor < highest < 30 * floor:  # too few powers of ten for labels
        grid[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    drawing.outer_labels(
        figure,
        grid,
        "entropy of the full prediction (nats)" if len(runs) < 3 else "entropy (nats)",
        "edges needed for a total variation of 0.2\n(share of all edges, log scale)",
    )
    return figure


def _early_exit_agreement(runs: Runs) -> Figure:
    single = len(runs) == 1
    names = drawing.run_handles(runs, 28)
    columns = [names[:4], names[4:], drawing.group_handles(single)]
    note = unmasked_note([density for _, density in runs])
    figure = drawing.new_figure(4.8, columns, note)
    axes = figure.add_subplot()
    for index, (_, density) in enumerate(runs):
        exits = density["early_exit"]
        for group in ("all", "easy"):
            values = 100 * drawing.array(exits["agreement"][group])
            axes.plot(exits["layers"], values, **drawing.look(index, group, single))
    deepest = max(max(density["early_exit"]["layers"]) for _, density in runs)
    axes.set(
        xlim=(0.8, deepest + 0.2),
        ylim=(0, 103),  # room for the markers at 100 %
        xlabel="layers run before the exit",
        ylabel="tokens with the same most likely next token\nas the full model (%)",
        title="How often stopping early gives the full model's prediction",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#E0E0E0", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def _edges_over_size(runs: Runs) -> Figure | None:
    counted = [(label, density) for label, density in runs if density["topology"]]
    if not counted:
        return None
    kinds = [
        Patch(
            facecolor=colour, hatch=hatch, edgecolor=_HATCH_COLOUR, linewidth=0,
            label=drawing.KIND_NAMES[kind],
        )
        for kind, (colour, hatch) in _KINDS.items()
    ]  # fmt: skip
    depths = [
        Patch(facecolor=drawing.lighter("#444444", by), label=f"{name} quarter of the layers")
        for name, by in _DEPTHS.items()
    ]
    note = unmasked_note([density for _, density in counted])
    figure, grid = drawing.panels([label for label, _ in counted], [kinds, depths], note)
    drawing.set_title(
        figure, "What traces are made of: kinds of edges, and how deep they lie, by size"
    )
    for axes, (_, density) in zip(grid, counted, strict=True):
        topology = density["topology"]
        shares, sizes = 100 * drawing.array(topology["shares"]), topology["sizes"]
        base = np.zeros(len(sizes))
        for kind, (colour, hatch) in _KINDS.items():
            column = topology["kinds"].index(kind)
            for depth, by in enumerate(_DEPTHS.values()):
                top = base + shares[:, depth, column]
                area = axes.fill_between(sizes, base, top, hatch=hatch, linewidth=0)
                area.set(facecolor=drawing.lighter(colour, by), edgecolor=_HATCH_COLOUR)
                base = top
            axes.plot(sizes, base, color="white", linewidth=1.8)
        axes.set_ylim(0, 100)
        drawing.size_axis(axes, narrow=len(counted) > 1)
    label = SIZE_LABEL if len(counted) == 1 else "size of the trace"
    drawing.outer_labels(figure, grid, label, "edges of the trace (%)")
    return figure


_PLOTS: dict[str, Callable[[Runs], Figure | None]] = {
    "tv_over_size": _tv_over_size,
    "size_against_entropy": _size_against_entropy,
    "edges_over_size": _edges_over_size,
    "early_exit_agreement": _early_exit_agreement,
}


def scatter_points(runs: Runs) -> tuple[list[tuple[Array, Array]], float]:
    """Entropy and size of each run's tokens, and the smallest size that a log axis shows.

    An empty trace can be enough; a log axis has no 0, so it stands at the smallest other size.
    """
    points = [
        (drawing.array(d["scatter"]["entropy"]), drawing.array(d["scatter"]["size_at_tv_0.2"]))
        for _, d in runs
    ]
    positive = np.concatenate([sizes[sizes > 0] for _, sizes in points])
    floor = float(positive.min()) if len(positive) else 1e-4
    return [(entropy, np.maximum(sizes, floor)) for entropy, sizes in points], floor


def binned_medians(x: Array, y: Array) -> tuple[Array, Array]:
    """Medians of ``x`` and ``y`` in twelve bins of equally many points, by rising ``x``."""
    parts = np.array_split(np.argsort(x, kind="stable"), min(12, len(x)))
    x_median, y_median = (np.array([np.median(v[part]) for part in parts]) for v in (x, y))
    return x_median, y_median


def _baseline_handles() -> list[Any]:
    handles = []
    for name, colour in _BASELINES.values():
        for suffix, dashes in _RESIDUAL.values():
            handles.append(Line2D([], [], color=colour, linewidth=1.4, label=f"{name}, {suffix}"))
            handles[-1].set_dashes(dashes)
    return handles
