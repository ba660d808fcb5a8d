"""``sensitivity.txt``: which conclusions each way to measure gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from softtrace.percent import percent
from softtrace.report.tables import aligned

_QUESTIONS = {
    "two_phases": "two phases",
    "entropy": "more uncertain, more edges",
    "order": "second has less area",
}


def sensitivity_table(found: Mapping[str, Any]) -> str:
    """A row each way to measure, and how many of them each conclusion survives.

    Args:
        found: the content of ``sensitivity.json``.
    """
    definitions: Sequence[Mapping[str, Any]] = found["definitions"]
    asked = [key for key in _QUESTIONS if key in definitions[0]["holds"]]
    rows = [
        [
            "attention", "edges by", "stand-in", "thresholds", "size at TV 0.2", "area",
            "area and entropy", *(_QUESTIONS[key] for key in asked),
        ]
    ]  # fmt: skip
    for each in definitions:
        last = each["models"][-1]
        rows.append([
            each["attention"], each["norm"], each["stand_in"], each["thresholds"],
            percent(last["size"]["value"]), f"{last['area']['value']:.3f}",
            _correlation(last["entropy"]), *(each["holds"][key] for key in asked),
        ])  # fmt: skip
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
    return "\n".join([header, "", aligned(rows), "", *survived, "", _LEGEND])


def _correlation(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"


_LEGEND = """\
Attention: where masked runs take their attention probabilities from. Edges by: how large an edge
is. Stand-in: what an absent edge carries. Thresholds: from how many a curve is read. "yes" and
"no": the 95 % interval (bootstrap over sequences) lies on one side of the bound, "open": it spans
it."""
