"""The page of plots of ``on_real_models.py``: what each way to train gives, by what it costs."""

from __future__ import annotations

import itertools
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
LENGTHS = {256: "o", 1024: "s"}


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """One row of panels for each model, text and kind of training; measured as recomputed.

    Args:
        table: rows of ``on_real_models.json``; shorter runs than LEAST, the first search, are left
            out, and plain runs that nothing is compared with yet.
        path: of the PNG.
    """
    table = [row for row in table if row["steps"] >= LEAST]
    kinds = sorted({_kind(row) for row in table if row["method"] != "plain"}, reverse=True)
    kinds.sort(key=lambda kind: "*" in kind)  # of text with copies last, as the tables have it
    methods = sorted({row["method"] for row in table}, key=lambda name: (name != "plain", name))
    pairs = mpl.colormaps["tab20"].colors  # dark and light in turn
    many = (*pairs[::2], *pairs[1::2], *mpl.colormaps["tab20b"].colors)
    colours = dict(zip(methods, itertools.cycle(many), strict=False))
    figure = Figure(figsize=(4 * len(MEASURES), 3.6 * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(len(kinds), len(MEASURES), squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        for panel, (measure, title) in zip(line, MEASURES.items(), strict=True):
            for row in (row for row in table if _kind(row) == kind):
                _draw(panel, row, measure, colours[row["method"]])
            panel.set_title(kind, fontsize=8)
            panel.set_ylabel(title, fontsize=8)
            panel.set_xlabel("held-out loss over plain fine-tuning, %", fontsize=8)
            panel.axvline(1.0, color="0.8", zorder=0)
            panel.tick_params(labelsize=8)
            if measure == "size_easy":
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    handles = [
        mpl.lines.Line2D([], [], color=colours[name], marker="o", linestyle="", label=name)
        for name in methods
    ] + [
        mpl.lines.Line2D([], [], color="0.4", marker=marker, linestyle="", label=f"{length} tokens")
        for length, marker in LENGTHS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, format="png")


def _kind(row: dict[str, Any]) -> str:
    trained = "LoRA" if row["lora"] else "full"
    copies = "*" if has_copies(row) else ""  # as the tables have it
    return f"{row['model']}, {row['text']}{copies}, {trained}, {row['steps']} steps"


def _draw(panel: Any, row: dict[str, Any], measure: str, colour: Any) -> None:
    loss = row["loss"]
    at = 100 * (loss["mean"] - 1)
    across = [[at - 100 * (loss["min"] - 1)], [100 * (loss["max"] - 1) - at]]
    for length, marker in LENGTHS.items():
        found = row[f"{length} recomputed"][measure]
        mean = found["mean"]
        panel.errorbar(
            at, mean, xerr=across, yerr=[[mean - found["min"]], [found["max"] - mean]],
            color=colour, marker=marker, markersize=5, linewidth=1,
        )  # fmt: skip
