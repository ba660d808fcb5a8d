"""What ``density.json`` says in plain-text tables, for one run and for several side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from softtrace.evaluation.bootstrap import CONFIDENCE
from softtrace.evaluation.density_file import Density
from softtrace.evaluation.intervals import RESAMPLES
from softtrace.metrics import functional
from softtrace.percent import brief_percent, percent
from softtrace.report.attention import attention_meaning, attention_name

Unit = Literal["nats", "share", "tv", "correlation"]

GROUPS = ("all", "easy", "hard")
_OTHERS_PER_TABLE = 3
SEPARATOR = "  "
COLUMNS = 80  # of a terminal

_MEANING = (
    f"{brief_percent(CONFIDENCE)} of {RESAMPLES:,} bootstrap samples of the blocks, in all of "
    "which the same tokens count as easy or hard"
)
_FEW = 10  # blocks, of whose resamples the intervals are far too narrow


def intervals_meaning(density: Density) -> str:
    """What the intervals are, for whoever reads them."""
    blocks = density["data"]["blocks"]
    too_few = f"; {blocks} blocks are too few for it: these intervals are too narrow"
    return _MEANING + (too_few if blocks < _FEW else "")


@dataclass(frozen=True)
class Measure:
    """One number of a run that runs are compared by.

    Attributes:
        key: its name in ``compare.json``.
        name: what a table calls it.
        unit: ``"nats"``, ``"share"`` (of 1), ``"tv"`` (0 to 1) or ``"correlation"`` (-1 to 1).
        better: which direction is an improvement; None for neither.
        read: takes it from a run; None where the run could not tell.
    """

    key: str
    name: str
    unit: Unit
    better: Literal["lower", "higher"] | None
    read: Callable[[Density], float | None]

    def format(self, value: float | None) -> str:
        """``value`` with its unit, as short as is useful."""
        return formatted(value, self.unit)


def shorten(label: str, length: int = 20) -> str:
    """``label``, cut in the middle if longer than ``length``: names often differ at the end."""
    if len(label) <= length:
        return label
    tail = (length - 1) // 2
    return f"{label[: length - 1 - tail]}…{label[-tail:]}"


def lengths_note(density: Density) -> str:
    """Which numbers compare with those of blocks of another length, and which do not."""
    return (
        "Sizes, areas and what traces are made of compare only with those of blocks of "
        f"{density['data']['block_size']:,} tokens with {density['min_context']:,} of context, as "
        "attention edges grow with the square of the length. Loss, entropy and early exits count "
        "no edges"
    )


def half_depth_exit(density: Density) -> int:
    """How many layers of its model half the depth is."""
    return functional.half_depth(len(density["early_exit"]["layers"]))


def all_held_out(runs: Sequence[tuple[str, Density]]) -> bool:
    """Whether the text of all runs was held out from training."""
    return all(str(density["data"]["split"]).startswith("held out") for _, density in runs)


def _group(field: str, group: str) -> Callable[[Density], float | None]:
    return lambda density: density[field][group]


def _exit(group: str) -> Callable[[Density], float | None]:
    return lambda density: density["early_exit"]["agreement"][group][half_depth_exit(density) - 1]


def _measures() -> Iterator[Measure]:
    yield Measure("loss_all", "loss (nats/token)", "nats", "lower", _group("loss_nats", "all"))
    groups = ("easy", "all", "hard")  # easy first: it is what training is after
    for group in groups:
        key, name = f"size_at_tv_0.2_{group}", f"edges needed on {group} tokens"
        read = _group("size_at_tv_0.2", group)
        yield Measure(key, f"{name} (median at TV 0.2)", "share", "lower", read)
    for group in groups:
        name = f"area under distortion, {group} tokens"
        yield Measure(f"area_{group}", name, "tv", "lower", _group("area", group))
    for group in groups:
        key, name = f"early_exit_half_{group}", "early exit at half depth agrees"
        yield Measure(key, f"{name}, {group} tokens", "share", "higher", _exit(group))
    name = "rank correlation of entropy and edges needed"
    read = _group("entropy_spearman", "size_at_tv_0.2")
    yield Measure("entropy_spearman_size", name, "correlation", None, read)


MEASURES = tuple(_measures())
"""What runs are compared by, in the order of the table."""


def ratio(value: float | None, first: float | None) -> float | None:
    """``value / first``; None where one is missing or ``first`` is 0."""
    return None if value is None or first is None or first == 0 else value / first


def density_table(density: Density) -> str:
    """The main numbers of one run: a row each for loss, area, size and early exit, by group."""
    model, data = density["model"], density["data"]
    half = half_depth_exit(density)
    exits = density["early_exit"]["agreement"]
    numbers: tuple[tuple[str, Unit, Mapping[str, float | None]], ...] = (
        ("loss (nats/token)", "nats", density["loss_nats"]),
        ("area under distortion", "tv", density["area"]),
        ("edges needed (median size at TV 0.2)", "share", density["size_at_tv_0.2"]),
        (
            f"early exit after {half} of {model['layers']} layers agrees",
            "share",
            {group: exits[group][half - 1] for group in GROUPS},
        ),
    )
    rows = [["", *GROUPS]]
    for name, unit, values in numbers:
        rows.append([name, *(formatted(values[group], unit) for group in GROUPS)])
    header = (
        f"{model['path']} ({model['type']}, {count(model['parameters'])} parameters, "
        f"{model['layers']} layers)\n"
    ) + wrapped(
        f"{density['tokens']:,} tokens, {data['split']}, in {data['blocks']:,} blocks of "
        f"{data['block_size']:,}; at least {density['min_context']:,} tokens of context; attention "
        f"of masked runs {density['attention']}"
    )
    legend = wrapped(
        f"Easy, hard: the quarters of the tokens with the lowest (to "
        f"{_nats(density['easy']['entropy_bound'])}) and the highest (from "
        f"{_nats(density['hard']['entropy_bound'])}) entropy.\n{_meanings(density)}"
    )
    return f"{header}\n\n{aligned(rows)}\n\n{legend}"


def comparison_table(runs: Sequence[tuple[str, Density]]) -> str:
    """All measures of several runs, each with its change against the first run.

    More than four runs are spread over several tables, each beginning with the first run.

    Args:
        runs: label and content of each ``density.json``; the first is what others are compared to.
    """
    held_out = all_held_out(runs)
    first, others = runs[0], runs[1:]
    tables = []
    for start in range(0, max(1, len(others)), _OTHERS_PER_TABLE):
        part = others[start : start + _OTHERS_PER_TABLE]
        rows = [["", shorten(first[0])]]
        for label, _ in part:
            rows[0] += [shorten(label), "change"]
        for measure in MEASURES:
            name = f"held-out {measure.name}" if held_out and measure.unit == "nats" else None
            base = measure.read(first[1])
            row = [name or measure.name, measure.format(base)]
            for _, density in part:
                value = measure.read(density)
                row += [measure.format(value), change(measure, value, base)]
            rows.append(row)
        tables.append(aligned(rows))
    densities = [density for _, density in runs]
    legend = wrapped(
        f"{attention_name(densities).capitalize()}: {attention_meaning(densities)}.\n"
        f"Change: relative to {first[0]}. Easy, hard: the quarters of the tokens with the lowest "
        "and highest entropy of each model's own prediction, so the tokens can differ between "
        "runs.\n" + _meanings(first[1])
    )
    return "\n\n".join([*tables, legend])


_MEANINGS = (
    "Edges needed: the smallest trace (share of all edges) within total variation (TV) 0.2 of the "
    "full prediction; lower: sparser.\n"
    "Area: mean TV over trace sizes from 0.01 % to 100 % on a log scale; lower: dropping edges "
    "costs less.\n"
    "Early exit agrees: its most likely token is the full model's; higher: upper layers are needed "
    "less."
)


def _meanings(density: Density) -> str:
    return f"{_MEANINGS}\n{lengths_note(density)}."


def wrapped(text: str) -> str:
    """``text`` with lines that a terminal shows whole."""
    return "\n".join(
        textwrap.fill(line, COLUMNS, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def formatted(value: float | None, unit: str, *, signed: bool = False) -> str:
    """A number as tables show it.

    Args:
        value: of a result file; None or NaN where there is none.
        unit: of it, see :class:`Measure`; or ``"edges"``, which are counted.
        signed: whether a plus stands before what is not negative, as it does before correlations.
    """
    if value is None or math.isnan(value):
        return "n/a"
    if unit == "share":
        return percent(value, signed=signed)
    if unit == "correlation":
        return f"{value:+.2f}"
    return f"{value:{'+' if signed else ''}{',.0f' if unit == 'edges' else '.3f'}}"


def percent_change(measure: Measure, value: float | None, base: float | None) -> float | None:
    """How much ``value`` differs from ``base``, in per cent of it, as exact as tables show it.

    None where one is missing or ``base`` is 0, and for correlations, whose ratio says nothing.
    """
    found = None if measure.unit == "correlation" else ratio(value, base)
    return None if found is None else round(100 * (found - 1), 1) + 0.0  # turns -0.0 into 0.0


def change(measure: Measure, value: float | None, base: float | None) -> str:
    """:func:`percent_change` in words, with a sign; nothing for correlations."""
    if measure.unit == "correlation":
        return ""
    found = percent_change(measure, value, base)
    return "n/a" if found is None else percent(found / 100, 1, signed=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first flush left, numbers flush right, a rule under the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        SEPARATOR.join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + len(SEPARATOR) * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def count(number: int) -> str:
    """A large number in short: 3.5 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _nats(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f} nats"


def interval(density: Density, key: str) -> tuple[float, float] | None:
    """The interval of one measure; None where the run has none, or not both its ends.

    Args:
        density: as :func:`~softtrace.evaluation.density_file.load_density` reads it, or as it was
            measured.
        key: of the measure.
    """
    low, high = (density.get("intervals") or {}).get(key) or (None, None)
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return low, high
