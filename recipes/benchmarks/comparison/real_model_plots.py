"""The page of plots of ``on_real_models.py``: what each way to train gives, by what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from recipes.benchmarks.comparison.real_texts import has_copies

#: measure -> what its axis says
MEASURES = {
    "area_easy": "area, easy tokens\n(attention recomputed)",
    "size_easy": "median size at TV 0.2, easy tokens\n(attention recomputed)",
    "spearman": "rank correlation of area and entropy\n(attention recomputed)",
    "exit_easy": "exits at half depth agree, easy tokens",
}
LEAST = 1000  # steps
#: what surrounds the number of a way to train, which says without colour which one it is
LENGTHS = {256: "o", 1024: "s"}
SIZE = 10.0  # of a point, which a number of two digits fits in
FEW = 4  # ways that the panels of one row tell apart in little room


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Draw the page and write it.

    Args:
        table: rows of ``on_real_models.json``.
        path: of the PNG.
    """
    drawn(table).savefig(path, dpi=110, format="png")


def drawn(table: list[dict[str, Any]]) -> Figure:
    """One row of panels for each model, text and kind of training; measured as recomputed.

    Every way to train has a number, which stands in its points and in the legend.

    Args:
        table: rows of ``on_real_models.json``; shorter runs than LEAST, the first search, are left
            out, and plain runs that nothing is compared with yet.
    """
    table = [row for row in table if row["steps"] >= LEAST]
    kinds = sorted({_kind(row) for row in table if row["method"] != "plain"}, reverse=True)
    kinds.sort(key=lambda kind: "*" in kind)  # of text with copies last, as the tables have it
    rows_of = {kind: [row for row in table if _kind(row) == kind] for kind in kinds}
    shown = {row["method"] for rows in rows_of.values() for row in rows}
    methods = sorted(shown, key=lambda name: (name != "plain", name))
    numbers = {name: number for number, name in enumerate(methods)}
    heights = [3.2 if len(rows_of[kind]) <= FEW else 6.4 for kind in kinds]
    figure = Figure(figsize=(5 * len(MEASURES), sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(
        len(kinds), len(MEASURES), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, kind in zip(panels, kinds, strict=True):
        for panel, (measure, title) in zip(line, MEASURES.items(), strict=True):
            _scale(panel, rows_of[kind], measure)
            for row in rows_of[kind]:
                _draw(panel, row, measure, numbers[row["method"]])
            panel.set_title(kind, fontsize=8)
            panel.set_ylabel(title, fontsize=8)
            panel.set_xlabel("held-out loss over plain fine-tuning, %", fontsize=8)
            panel.axvline(1.0, color="0.8", zorder=0)
            panel.tick_params(labelsize=8)
    look: dict[str, Any] = {"markerfacecolor": "white", "markersize": SIZE, "linestyle": ""}
    handles = [
        mpl.lines.Line2D(
            [], [], color=_colour(number), marker="D", label=f"{number} {name}", **look
        )
        for name, number in numbers.items()
    ] + [
        mpl.lines.Line2D([], [], color="0.4", marker=marker, label=f"{length} tokens", **look)
        for length, marker in LENGTHS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return figure


def _colour(number: int) -> Any:
    pairs = mpl.colormaps["tab20"].colors  # dark and light in turn
    many = (*pairs[::2], *pairs[1::2], *mpl.colormaps["tab20b"].colors)
    return many[number % len(many)]


def _kind(row: dict[str, Any]) -> str:
    trained = "LoRA" if row["lora"] else "full"
    copies = "*" if has_copies(row) else ""  # as the tables have it
    return f"{row['model']}, {row['text']}{copies}, {trained}, {row['steps']} steps"


def _scale(panel: Any, rows: list[dict[str, Any]], measure: str) -> None:
    """Sizes on a log scale, and losses where one of them is far from the others."""
    if measure == "size_easy":
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    if max(row["loss"]["mean"] for row in rows) > 1.03:
        panel.set_xscale("symlog", linthresh=2, linscale=2)
        panel.set_xticks([0, 0.5, 1, 1.5, 2, 5, 10])
        panel.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))


def _draw(panel: Any, row: dict[str, Any], measure: str, number: int) -> None:
    loss, colour = row["loss"], _colour(number)
    at = 100 * (loss["mean"] - 1)
    across = [[at - 100 * (loss["min"] - 1)], [100 * (loss["max"] - 1) - at]]
    for place, (length, marker) in enumerate(LENGTHS.items()):
        found = row[f"{length} recomputed"][measure]
        mean = found["mean"]
        # What covers a point covers its number too, which would stand in another's otherwise.
        above = 2 + (len(LENGTHS) * number + place) / 1000
        panel.errorbar(
            at, mean, xerr=across, yerr=[[mean - found["min"]], [found["max"] - mean]],
            color=colour, linewidth=1, zorder=1,
        )  # fmt: skip
        panel.plot(
            at, mean, color=colour, marker=marker, markersize=SIZE, markerfacecolor="white",
            linestyle="", zorder=above,
        )  # fmt: skip
        panel.annotate(
            str(number), (at, mean), ha="center", va="center_baseline", fontsize=7, zorder=above
        )
