"""What ``study.json`` says, as a plain-text table: every number with its interval."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice, zip_longest
from operator import getitem
from typing import Any

from softtrace.percent import brief_percent
from softtrace.report.tables import COLUMNS, SEPARATOR, aligned, formatted, shorten, wrapped

Study = Mapping[str, Any]
"""The content of a ``study.json``."""

_SIZES = (1e-4, 1e-3, 1e-2, 1e-1)
_NUCLEI = (0.1, 0.9)

_LEGEND = (
    "In brackets: {confidence} percentile intervals, bootstrap over sequences "
    "({resamples:,} resamples, seed {seed}).\n"
    "TV: total variation from the full prediction (0: the same). Edges needed: the smallest trace "
    "with a TV of at most {total_variation:g}.\n"
    "Top-p list: the most likely tokens that make up a probability of p, in order.\n"
    "Unigrams: how frequent tokens are in the {unigram_tokens:,} tokens of the training side, "
    "{smoothing}; "
    "their rank correlation is over the {seen:,} tokens that occur there. Their "
    "entropy is {entropy:.2f} nats; all tokens equally likely: KL {uniform_kl:.2f}.\n"
    "Window of n: the same {targets} tokens of every sequence, each seen with just n tokens (its "
    "own included).\n"
    "Position: its place in the sequence; with all before it, its context grows with it."
)

Row = tuple[str, str, tuple[int, ...]]
"""What a row is called, the key of a result, and where in it the row's number is."""


def study_table(study: Study) -> str:
    """The main numbers of a study: a row a model, and of two the change."""
    models, data, settings = study["models"], study["data"], study["settings"]
    text = section_lines(study, _sections(study))
    text += pair_lines(study, "area")
    unigrams = study["unigrams"]
    header = (
        f"{' and '.join(model['path'] for model in models)}\n"
        f"{study['tokens']:,} tokens of {data['blocks']:,} sequences of {data['block_size']}, "
        f"{data['split']}; at least {settings['min_context']} tokens of context; "
        f"attention of masked runs {settings['attention']}"
    )
    legend = filled(
        _LEGEND,
        settings,
        unigram_tokens=unigrams["tokens"],
        smoothing=unigrams["smoothing"],
        seen=unigrams["seen"],
        entropy=unigrams["entropy_nats"],
        uniform_kl=unigrams["uniform_kl_nats"],
    )
    return "\n".join([wrapped(header), "", *text, wrapped(legend)])


def filled(legend: str, settings: Mapping[str, Any], **others: Any) -> str:
    """A legend with the settings of a study filled in, the confidence in per cent, and others."""
    confidence = brief_percent(settings["confidence"])
    return legend.format(**{**settings, "confidence": confidence, **others})


def section_lines(study: Study, sections: Iterable[tuple[str, list[Row]]]) -> list[str]:
    """A block of rows a section, with a blank line after each; of two models also the change.

    Of one model every number is a row. Columns of several would not fit a terminal: they stand
    below each other, and what the number is called beside them, over as many lines as it takes.

    Args:
        study: the content of a ``study.json`` or ``paper.json``.
        sections: titles with their rows.
    """
    models = study["models"]
    single, both = len(models) == 1, len(models) == 2
    labels = [*(shorten(model["label"]) for model in models), *["change"] * both]
    blocks = [
        (title, [(name, _values(study["results"][key], place, both)) for name, key, place in rows])
        for title, rows in sections
    ]
    widest = max(len(value) for _, rows in blocks for _, values in rows for value in values)
    named = max(map(len, labels))
    right = max(named, widest) if single else named + len(SEPARATOR) + widest
    # The same room for names in all sections, so that the columns of all stand under each other.
    room = COLUMNS - len(SEPARATOR) - right
    tables = []
    for title, rows in blocks:
        head = _beside(title, labels if single else [], room)
        body = []
        for name, values in rows:
            cells = values if single else [
                f"{label:{named}}{SEPARATOR}{value:>{widest}}"
                for label, value in zip(labels, values, strict=True)
            ]  # fmt: skip
            body += _beside(name, cells, room)
        tables.append((head, body))
    table = aligned([row for parts in tables for part in parts for row in part])
    first, rule, *others = table.split("\n")
    lines = iter([first, *others])
    text: list[str] = []
    for head, body in tables:
        text += [*islice(lines, len(head)), rule, *islice(lines, len(body)), ""]
    if both:
        text += ["Change: the second model less the first, of shares in percentage points.", ""]
    return text


def _values(result: Mapping[str, Any], place: tuple[int, ...], both: bool) -> list[str]:
    """A number of every model, and of two the change."""
    found = [*result["models"], *([result["difference"]] if both else [])]
    return [
        cell({end: reduce(getitem, place, part[end]) for end in part}, result["unit"],
             signed=both and at == 2)
        for at, part in enumerate(found)
    ]  # fmt: skip


def _beside(name: str, cells: Sequence[str], room: int) -> list[list[str]]:
    """Rows of a name, over as many lines as it takes, and of what stands beside it."""
    whole = name.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = [
        line.replace("\N{NO-BREAK SPACE}", " ")
        for line in textwrap.wrap(whole, room, subsequent_indent="  ")
    ]
    return [[*row] for row in zip_longest(lines, cells, fillvalue="")]


def _sections(study: Study) -> Iterator[tuple[str, list[Row]]]:
    results, axes = study["results"], study["axes"]

    def rows(*keys: str) -> list[Row]:
        return [(results[key]["name"], key, ()) for key in keys]

    sizes = [(nearest_size(axes["sizes"], size), size) for size in _SIZES]
    full = (len(axes["sizes"]) - 1, 1.0)
    yield "Overall", rows("overall/loss", "overall/entropy", "overall/area", "overall/size")

    found: list[Row] = [(f"mean TV at {size_name(s)}", "phases/tv", (at,)) for at, s in sizes]
    found += rows("phases/construction")
    attention = axes["kinds"].index("attention")
    for at, s in (*sizes[::2], full):
        found.append(
            (f"attention among the edges at {size_name(s)}", "phases/kinds", (at, attention))
        )
    for at, s in (*sizes[::2], full):
        found.append((f"first quarter of the layers at {size_name(s)}", "phases/depths", (at, 0)))
    for p in _NUCLEI:
        for at, s in sizes[1:]:
            place = (at, axes["nucleus_p"].index(p))
            found.append((f"top-{p:g} lists recovered at {size_name(s)}", "phases/nucleus", place))
    yield "Two phases", found

    keys = [f"uncertainty/{a}_{b}" for a in ("size", "area") for b in ("entropy", "surprisal")]
    names = [f"{a}, {b}" for a in ("edges needed", "area") for b in ("entropy", "loss")]
    yield "Uncertainty: rank correlations", [(n, k, ()) for n, k in zip(names, keys, strict=True)]

    found = []
    for key, name in (("unigram_kl", "KL from"), ("unigram_spearman", "rank correlation with")):
        for at, s in (*sizes, full):
            found.append((f"{name} the unigrams at {size_name(s)}", f"shallow/{key}", (at,)))
        found.append(("   at the smallest less in full", f"shallow/{key}_change", ()))
    yield "Shallow statistics", found

    found = []
    for key in ("size", "edges", "area", "attention", "surprisal"):
        name = results[f"length/{key}"]["name"]
        for at, length in enumerate(axes["lengths"]):
            found.append((f"{name}, window of {length}", f"length/{key}", (at,)))
        if len(axes["lengths"]) > 1:
            found.append(("   longest less shortest", f"length/{key}_change", ()))
    yield "Length", found

    found = []
    for key, name in (("size", "edges needed"), ("area", "area")):
        for at, context in enumerate(axes["contexts"]):
            where = context if isinstance(context, str) else f"window of {context}"
            found.append((f"{name}, {where}", f"position/{key}_spearman", (at,)))
    yield "Position: rank correlations", found


def pair_lines(study: Study, what: str) -> list[str]:
    """Rank correlations of densities between each two models; none for a single one.

    Args:
        study: the content of a ``study.json`` or ``paper.json``.
        what: the density.
    """
    if not study["pairs"]:
        return []
    labels = [model["label"] for model in study["models"]]
    unit = "texts" if study.get("own_tokens") else "tokens"
    rows = [[f"Rank correlation of {what} on the same {unit}", ""]]
    for pair in study["pairs"]:
        first, second = (shorten(labels[at]) for at in pair["models"])
        rows.append([f"{first} and {second}", cell(pair, "correlation")])
    return [aligned(rows), ""]


def nearest_size(sizes: list[float], wanted: float) -> int:
    """Place of the size nearest to a wanted one, as a ratio."""
    return min(range(len(sizes)), key=lambda at: abs(sizes[at] / wanted - 1))


def size_name(size: float) -> str:
    """A size as tables name it."""
    return "full size" if size == 1 else brief_percent(size)


def cell(ends: Mapping[str, float | None], unit: str, *, signed: bool = False) -> str:
    """A number with its interval; ``signed`` for a change."""
    value, low, high = (
        formatted(ends[name], unit, signed=signed) for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"
