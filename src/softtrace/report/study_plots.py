"""The page of plots of a ``study.json``: a panel a question, intervals as bands and whiskers.

Models are told apart by line style and marker, and by colour where nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from softtrace.percent import brief_percent
from softtrace.report import drawing
from softtrace.report.attention import attention_name
from softtrace.report.drawing import COLOURS, GREY, MARKERS, Array
from softtrace.report.study_tables import Study
from softtrace.report.tables import shorten

_SIZE = "size of the trace (log scale)"
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
_NUCLEI = (0.1, 0.4, 0.9)
Panel = tuple[str, Callable[[Axes, Study], None]]
Draw = Callable[[Study], Figure]


def write_page(draw: Draw, study: Study, path: Path) -> Path:
    """Write a page of plots as PNG, atomically; the same numbers give the same bytes.

    Args:
        draw: makes the page, such as :func:`draw_study`.
        study: the content of the result file.
        path: that is written, and returned.
    """
    with drawing.style():
        return drawing.save(draw(study), path)


def draw_study(study: Study) -> Figure:
    """The page of a ``study.json``, twelve panels; to be called within ``drawing.style``."""
    return draw_page(study, _PANELS, 21.0)


def draw_page(
    study: Study, panels: Sequence[Panel], height: float, title: str | None = None
) -> Figure:
    """A page of panels, two in a row, above a legend of the models.

    Args:
        study: the content of a ``study.json``, ``paper.json`` or ``generation.json``.
        panels: title of each, and what draws it.
        height: inches, without the legend.
        title: of the page.
    """
    note = attention_name([study["settings"]])
    figure = drawing.new_figure(height, model_handles(study), note)
    if title is not None:
        drawing.set_title(figure, title)
    figure.set_layout_engine("constrained", hspace=0.05, wspace=0.05)
    grid = figure.subplots(len(panels) // 2, 2).ravel()
    for axes, (title, draw) in zip(grid, panels, strict=True):
        axes.set_title(title, fontsize=11, pad=20 if draw is _variation else 6)
        draw(axes, study)
        axes.grid(axis="y", color="#E0E0E0", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _variation(axes: Axes, study: Study) -> None:
    means = [found["value"] for found in study["results"]["phases/tv"]["models"]]
    drawing.shade_phases(axes, [(study["axes"]["sizes"], mean) for mean in means])
    for at, ends in each_model(study, "phases/tv"):
        band(axes, study, at, ends, colour_of(at))
    axes.set(ylim=(0, 1), ylabel="mean TV from the full prediction")


def _kinds(axes: Axes, study: Study) -> None:
    names = [drawing.KIND_NAMES[kind] for kind in study["axes"]["kinds"]]
    several(axes, study, "phases/kinds", range(len(names)), names)
    axes.set_ylabel("edges of the trace (%)")


def _depths(axes: Axes, study: Study) -> None:
    names = [f"{name} quarter of the layers" for name in ("first", "second", "third", "last")]
    several(axes, study, "phases/depths", range(4), names)
    axes.set_ylabel("edges of the trace (%)")


def _nucleus(axes: Axes, study: Study) -> None:
    places = [study["axes"]["nucleus_p"].index(p) for p in _NUCLEI]
    names = [f"p = {p:g}" for p in _NUCLEI]
    several(axes, study, "phases/nucleus", places, names)
    axes.set_ylabel("top-p lists recovered (%)")


def _uncertainty(axes: Axes, study: Study) -> None:
    rows = [("size", "entropy"), ("size", "surprisal"), ("area", "entropy"), ("area", "surprisal")]
    names = {"size": "edges needed", "area": "area", "surprisal": "loss", "entropy": "entropy"}
    count = len(study["models"])
    for row, (what, against) in enumerate(rows):
        for at, ends in each_model(study, f"uncertainty/{what}_{against}"):
            height = row + 0.24 * (at - (count - 1) / 2)
            _whiskers(axes, at, [ends["value"]], ends, [height], flat=True)
    axes.set_yticks(range(4), [f"{names[a]},\n{names[b]}" for a, b in rows])
    axes.set(ylim=(3.6, -0.6), xlabel="rank correlation")
    axes.axvline(0, color=GREY, linewidth=0.8)


def _spearman(axes: Axes, study: Study) -> None:
    for at, ends in each_model(study, "shallow/unigram_spearman"):
        band(axes, study, at, ends, colour_of(at))
    axes.set_ylabel("rank correlation with the unigrams")


def _divergence(axes: Axes, study: Study) -> None:
    for at, ends in each_model(study, "shallow/unigram_kl"):
        band(axes, study, at, ends, colour_of(at))
    uniform = study["unigrams"]["uniform_kl_nats"]
    axes.axhline(uniform, color=GREY, linewidth=1, linestyle=":")
    where = axes.get_yaxis_transform()
    label = "all tokens equally likely"
    axes.text(0.99, uniform, label, transform=where, ha="right", va="bottom", fontsize=9)
    axes.set(ylabel="KL from the unigrams (nats)", ylim=(0, None))


def _over_lengths(what: str, label: str, *, share: bool = False) -> Callable[[Axes, Study], None]:
    """A panel of one number over the lengths of windows; ``share``: labelled in per cent."""

    def draw(axes: Axes, study: Study) -> None:
        lengths = study["axes"]["lengths"]
        for at, ends in each_model(study, f"length/{what}"):
            x = [length * 1.03**at for length in lengths]  # beside each other, not over
            _whiskers(axes, at, ends["value"], ends, x)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(ylim=(0, None), xlabel="tokens in the window (log scale)", ylabel=label)
        if share:
            axes.yaxis.set_major_formatter(drawing.percent_tick)

    return draw


def _position(axes: Axes, study: Study) -> None:
    contexts, positions = study["axes"]["contexts"], study["axes"]["positions"]
    beside = 0.022 * max(1, positions[-1] - positions[0])
    handles = []
    for line, context in enumerate((contexts[-2], contexts[-1])):
        at_context = len(contexts) - 2 + line
        colour, marker = ((COLOURS[2], "^"), (COLOURS[4], "D"))[line]
        for at, ends in each_model(study, "position/size"):
            x = [place + beside * (2 * line + at - 1) for place in positions]
            y, low, high = (ends[name][:, at_context] for name in ("value", "low", "high"))
            _whiskers(axes, at, y, {"low": low, "high": high}, x, colour=colour, marker=marker)
        label = f"window of {context}" if line == 0 else "all tokens before it"
        handles.append(Line2D([], [], color=colour, marker=marker, label=label))
    axes.legend(handles=handles, fontsize=9)
    axes.set(xlabel="position in the sequence", ylabel="edges needed (share of all, median)")
    axes.set_xticks(positions)
    drawing.log_percent(axes)


_PANELS = (
    ("By size: how far off a trace is", _variation),
    ("By size: kinds of edges", _kinds),
    ("By size: how deep the edges lie", _depths),
    ("By size: most likely tokens recovered", _nucleus),
    ("Computation against uncertainty", _uncertainty),
    ("Shallow statistics: ranks of tokens", _spearman),
    ("Shallow statistics: distance", _divergence),
    (
        "The same tokens in windows: share of edges",
        _over_lengths("size", "edges needed (share of all, median)", share=True),
    ),
    (
        "The same tokens in windows: number of edges",
        _over_lengths("edges", "edges needed (number, median)"),
    ),
    ("The same tokens in windows: area", _over_lengths("area", "area under distortion")),
    (
        "The same tokens in windows: attention",
        _over_lengths("attention", "attention among the edges needed", share=True),
    ),
    ("By position, at matched length and not", _position),
)


def model_handles(study: Study) -> list[list[Any]]:
    """Columns of legend handles, at most four: the models, and what intervals look like."""
    models = study["models"]
    handles: list[Any] = [
        Line2D([], [], color=colour_of(at), marker=MARKERS[at % len(MARKERS)],
               linestyle=LINES[at % len(LINES)], linewidth=2,
               label=shorten(drawing.printable(model["label"]), 40))
        for at, model in enumerate(models)
    ]  # fmt: skip
    confidence = f"{brief_percent(study['settings']['confidence'])} interval"
    handles.append(Patch(color=GREY, alpha=0.25, label=f"{confidence}, also as whiskers"))
    return [handles[column::4] for column in range(4)]


def each_model(study: Study, key: str) -> Iterator[tuple[int, dict[str, Array]]]:
    """Place and numbers (value, low, high) of every model."""
    for at, found in enumerate(study["results"][key]["models"]):
        yield at, {name: drawing.array(values) for name, values in found.items()}


def colour_of(at: int) -> str:
    """A model's colour, where nothing else needs colour."""
    return COLOURS[at % len(COLOURS)]


def band(
    axes: Axes,
    study: Study,
    at: int,
    ends: dict[str, Array],
    colour: str,
    marker: str = "",
    offset: int = 0,
) -> None:
    """A line over sizes, its interval as a band; ``offset``: so that no marker hides another."""
    sizes = study["axes"]["sizes"]
    step = max(1, len(sizes) // 6)
    axes.fill_between(sizes, ends["low"], ends["high"], color=colour, alpha=0.25, linewidth=0)
    look: dict[str, Any] = {"color": colour, "linestyle": LINES[at % len(LINES)]}
    look |= {
        "marker": marker or MARKERS[at % len(MARKERS)],
        "markevery": ((2 * at + offset) * step // 4 % step, step),
    }
    axes.plot(sizes, ends["value"], linewidth=1.8, markersize=5, **look)
    drawing.size_axis(axes)
    axes.set_xlabel(_SIZE)


def several(
    axes: Axes, study: Study, key: str, places: Sequence[int], names: Sequence[str]
) -> None:
    """Lines over sizes in per cent, told apart by marker and colour; models by line style."""
    handles = []
    for index, (place, name) in enumerate(zip(places, names, strict=True)):
        colour, marker = COLOURS[index], MARKERS[index]
        for at, ends in each_model(study, key):
            part = {end: 100 * values[:, place] for end, values in ends.items()}
            band(axes, study, at, part, colour, marker, offset=index)
        handles.append(Line2D([], [], color=colour, marker=marker, label=name))
    axes.legend(handles=handles, fontsize=9)
    axes.set_ylim(0, 102)


def _whiskers(
    axes: Axes,
    at: int,
    values: Any,
    ends: dict[str, Array],
    x: Sequence[float],
    *,
    colour: str | None = None,
    marker: str = "",
    flat: bool = False,
) -> None:
    """Markers with their intervals as whiskers; ``flat``: values along x, ``x`` along y."""
    middle, reach = (ends["high"] + ends["low"]) / 2, (ends["high"] - ends["low"]) / 2
    colour = colour or colour_of(at)
    if flat:
        axes.errorbar(middle, x, xerr=reach, fmt="none", ecolor=colour, capsize=4)
    else:
        axes.errorbar(x, middle, yerr=reach, fmt="none", ecolor=colour, capsize=4)
    line = "" if flat else LINES[at % len(LINES)]
    points = (values, x) if flat else (x, values)
    axes.plot(
        *points,
        color=colour,
        marker=marker or MARKERS[at % len(MARKERS)],
        linewidth=1.8,
        linestyle=line,
    )
