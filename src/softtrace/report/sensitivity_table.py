"""``sensitivity.txt``: which conclusions each way to measure gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from softtrace.report.study_tables import cell
from softtrace.report.tables import aligned, formatted, wrapped

# Heads over as many lines as keep them as narrow as what stands below.
_WAY = ("attention", "edges\nby", "stand-in", "thresholds")
_NUMBERS = ("size at\nTV 0.2", "area", "area and entropy")
_QUESTIONS = {
    "two_phases": "two phases",
    "entropy": "more\nuncertain,\nmore edges",
    "order": "second has\nless area",
}


def sensitivity_table(found: Mapping[str, Any]) -> str:
    """Two rows each way to measure, its numbers and its answers, and what each question survives.

    Args:
        found: the content of ``sensitivity.json``.
    """
    definitions: Sequence[Mapping[str, Any]] = found["definitions"]
    asked = [key for key in _QUESTIONS if key in definitions[0]["holds"]]
    numbers, answers = [], []
    for each in definitions:
        way = [each["attention"], each["norm"], each["stand_in"], each["thresholds"]]
        last = each["models"][-1]
        size = formatted(last["size"]["value"], "share")
        area = formatted(last["area"]["value"], "tv")
        numbers.append([*way, size, area, cell(last["entropy"], "correlation")])
        answers.append([*way, *(each["holds"][key] for key in asked)])
    # A row of both would not fit a terminal.
    tables = [
        _headed((*_WAY, *_NUMBERS), numbers),
        _headed((*_WAY, *(_QUESTIONS[key] for key in asked)), answers),
    ]
    survived = []
    for key in asked:
        count = Counter(each["holds"][key] for each in definitions)
        survived.append(
            f"{found['conclusions'][key]}: yes in {count['yes']}, no in {count['no']}, open in "
            f"{count['open']} of {len(definitions)} ways."
        )
    data = found["data"]
    header = (
        f"{' and '.join(model['path'] for model in found['models'])}\n"
        f"{found['tokens']:,} tokens of {data['blocks']:,} sequences of {data['block_size']}, "
        f"{data['split']}; numbers are the last model's"
    )
    parts = [wrapped(header), *tables, wrapped("\n".join(survived)), wrapped(_LEGEND)]
    return "\n\n".join(parts)


def _headed(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under heads of several lines, of which the last stands on the rule."""
    above = [list(reversed(head.split("\n"))) for head in heads]
    lines = list(reversed(list(zip_longest(*above, fillvalue=""))))
    first, rule, *others = aligned([*lines, *rows]).split("\n")
    end = len(lines) - 1
    return "\n".join([first, *others[:end], rule, *others[end:]])


_LEGEND = (
    "Attention: where masked runs take their attention probabilities from. Edges by: how large an "
    "edge is. Stand-in: what an absent edge carries. Thresholds: from how many a curve is read. "
    '"yes" and "no": the 95 % interval (bootstrap over sequences) lies on one side of the bound, '
    '"open": it spans it.'
)
