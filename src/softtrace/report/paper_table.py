"""What ``paper.json`` says, as a plain-text table: the numbers behind the paper's figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from softtrace.percent import percent
from softtrace.report.study_tables import (
    Row,
    filled,
    nearest_size,
    pair_lines,
    section_lines,
    size_name,
)
from softtrace.report.tables import wrapped

Paper = Mapping[str, Any]
"""The content of a ``paper.json``."""

_SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_GROUPS = ("initial", "early-mid", "late-mid", "last")
_MOST = 5

_LEGEND = (
    "In brackets: {confidence} percentile intervals, bootstrap over inputs ({resamples:,} "
    "resamples, seed {seed}). Definitions are those of arXiv 2605.27033 and its authors' code; "
    "recipes/PAPER.md has them beside this project's own.\n"
    "TV: total variation from the full prediction. AUC: TV over log10 of the size, not divided by "
    "its width. nu: the largest p in per cent whose ordered top-p lists agree. Inverse: the model "
    "without the trace, residual edges kept. Random: grown from the output, residual edges kept. "
    "Top-5 nucleus: the five most likely tokens of the top-60 % list; their frequency is in the "
    "{tokens:,} tokens of the training side. Connected: there is a path from a token to the output."
)


def paper_table(paper: Paper) -> str:
    """The numbers of every model by size: a row a model, and of two the change."""
    models, settings = paper["models"], paper["settings"]
    text = section_lines(paper, _sections(paper))
    header = (
        f"{', '.join(model['path'] for model in models)}\n"
        f"{paper['inputs']:,} inputs of {paper['context']} tokens and the one to predict, "
        f"{paper['data']['split']}; attention of masked runs {settings['attention']}"
    )
    legend = filled(_LEGEND, settings, tokens=paper["unigrams"]["tokens"])
    pairs = pair_lines(paper, "AUC")
    own = _own_tokens(paper)
    above, below = ([*map(wrapped, lines)] for lines in ([header, *own], _components(paper)))
    return "\n".join([*above, "", *text, *pairs, *below, "", wrapped(legend)])


def _own_tokens(paper: Paper) -> list[str]:
    """What differs where models have tokenizers of their own."""
    own = paper["own_tokens"]
    if not own:
        return []
    lengths = ", ".join(f"{mean:.1f}" for mean in own["context_mean"])
    left_out = ", ".join(f"{why}: {count}" for why, count in own["left_out"].items())
    return [
        f"Tokenizers differ: {own['note']}.",
        f"Tokens of context on average: {lengths}. Texts left out: {left_out or 'none'}.",
    ]


def _sections(paper: Paper) -> Iterator[tuple[str, list[Row]]]:
    axes = paper["axes"]
    sizes = [(nearest_size(axes["sizes"], size), size) for size in _SIZES]

    def by_size(name: str, key: str, *place: int) -> list[Row]:
        return [(f"{name} at {size_name(size)}", key, (at, *place)) for at, size in sizes]

    yield (
        "Overall",
        [
            ("loss", "loss", ()),
            ("entropy", "entropy", ()),
            ("AUC", "auc", ()),
            ("entropy and AUC, rank correlation", "entropy_auc", ()),
        ],
    )
    yield "Reconstruction", by_size("TV, trace", "tv/trace")
    yield "Without the trace", by_size("TV, inverse", "tv/inverse")
    yield "A random subgraph", by_size("TV, random", "tv/random")
    nucleus: list[Row] = [
        (f"nu >= {k} %, {name}", "nucleus", (row, column))
        for row, k in enumerate(axes["nucleus_k"])
        for column, name in ((1, "median"), (0, "first quartile"), (2, "third quartile"))
    ]
    yield "Smallest size for a shared nucleus", nucleus
    kinds = [by_size(kind, "kinds", at) for at, kind in enumerate(axes["kinds"])]
    yield "Edges by kind", [row for rows in kinds for row in rows]
    depths = [by_size(f"{group} layers", "depths", at) for at, group in enumerate(_GROUPS)]
    yield "Edges by depth (array_split)", [row for rows in depths for row in rows]
    yield "Unigram frequency of the top-5 nucleus", by_size("frequency", "frequency")
    yield "True token: loss", by_size("loss", "true/loss")
    yield "True token: rank", by_size("median rank", "true/rank")
    connected = by_size("share", "connected")
    connected.append(("smallest connected size, median", "connection", (1,)))
    yield "Connected to the input", connected
    components: list[Row] = [
        (f"{name} at {size_name(size)}", f"components/{key}", (at,))
        for key, name in (("share", "components in a trace"), ("gini", "Gini coefficient"))
        for at, size in enumerate(axes["component_sizes"])
    ]
    yield "Heads and MLPs", components


def _components(paper: Paper) -> list[str]:
    """The components that most traces of 0.1 % go through, a line a model."""
    at = nearest_size(paper["axes"]["component_sizes"], 1e-3)
    lines = []
    for model, found in zip(paper["models"], paper["components"], strict=True):
        shares = dict(zip(found["names"], found["frequency"][at], strict=True))
        most = sorted(shares, key=lambda name: -shares[name])[:_MOST]
        named = ", ".join(f"{name} ({percent(shares[name], 0)})" for name in most if shares[name])
        lines.append(f"Most frequent at 0.1 %, {model['label']}: {named or 'none'}.")
    return lines
