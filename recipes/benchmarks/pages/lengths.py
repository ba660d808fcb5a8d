"""What the pages say of memory and time of long texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.benchmarks.pages.comparison import quartiles
from recipes.benchmarks.pages.sources import CARD, read, sources
from recipes.benchmarks.places import RESULTS

Row = dict[str, Any]
FILES, PLOT = ("lengths.json", "lengths-cpu.json"), "lengths.png"


def lengths() -> str:
    """Memory and time by the length of the text, a table a device, and what is asked of one."""
    rows = [row for name in FILES for row in read(name)["rows"]]
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        parts.append(_table([row for row in own if row["what"] not in SAID], device))
        said = [SAID[row["what"]](row) for row in own if row["what"] in SAID]
        parts += ["\n".join(f"- {each}" for each in said)] if said else []
    if (RESULTS / PLOT).exists():  # drawn by the script, where it measured last
        parts.append(f"![Memory and seconds by the length]({CARD}results/{PLOT})")
    files = (f"results/{name}" for name in FILES)
    parts.append(sources(CARD, "speed/lengths.py", *files))
    return "\n\n".join(parts)


def _table(rows: list[Row], device: str) -> str:
    """Seconds and GiB of every measurement of one sequence."""
    cells = {(row["model"], row["what"], row["length"]): row for row in rows}
    columns = sorted({row["length"] for row in rows})
    lines = [
        f"| {device} | {' | '.join(f'{length:,} tokens' for length in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        found = (cells.get((model, what, length)) for length in columns)
        lines.append(f"| {model}: {what} | {' | '.join(map(_cell, found))} |")
    dtype, count = ("float32", "one") if device.startswith("CPU") else ("bfloat16", "eight")
    busy = max(row["load"] for row in rows)
    if device.startswith("CPU") and busy > int(device.split()[-1]):
        beside = f" Other programs ran on the same cores (load up to {busy:g})."
    else:
        beside = ""
    steps = f", steps of {count}" if any("step" in row["what"] for row in rows) else ""
    timed = any("seconds" in row for row in rows)
    shown = "Seconds and most GiB" if timed else "Most GiB"
    untimed = "" if timed else " Others used the GPU too, so that no times are given."
    lines.append(
        f"\n{shown} alive beyond the weights (of that, held by the result), one "
        f"sequence{steps}; {dtype}, random weights.{untimed}{beside}"
    )
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return str(row["error"])
    held = f" ({row['held_gib']:.2f})" if row["held_gib"] >= 0.01 else ""
    seconds = f"{row['seconds']:.3g} s, " if "seconds" in row else ""
    return f"{seconds}{row['peak_gib']:.2f}{held}"


def _evaluate(row: Row) -> str:
    alone, extra = row["curves"], row["curves and baselines"]
    return (
        f"{row['model']}: what `evaluate` measures of {_batch(row)} takes "
        f"{alone['over_masked_runs']:.2f} times as long as its masked runs, and with baselines of "
        f"every block {extra['over_masked_runs']:.2f}; "
        f"{alone['over_forwards']:.2f} and {extra['over_forwards']:.2f} times as long as so many "
        "plain forwards."
    )


def _literal(row: Row) -> str:
    searched = row["literal"][0]["searched"]
    return (
        f"{row['model']}: a curve of all positions of {_batch(row)} takes "
        f"{1000 * row['seconds_per_position']:.3g} ms a position. The literal method, a best-first "
        f"search edge by edge and a masked run for each of 26 sizes, takes at least "
        f"{row['times_at_least']:,.0f} times that, which is when it has found {searched:,} of up "
        f"to {row['literal'][-1]['edges']:,} edges; at that rate {row['times_extrapolated']:,.0f} "
        "times."
    )


def _training(row: Row) -> str:
    return (
        f"{row['model']}: a training step of {_batch(row)} with the default term takes "
        f"{quartiles(row['default']['over_plain'])} times a plain one with sdpa attention, with "
        f"windows of whole rows {quartiles(row['whole rows']['over_plain'])} (quartiles of "
        f"{row['turns']} interleaved turns, {row['precision']})."
    )


def _batch(row: Row) -> str:
    rows, length = row["batch"]
    return f"{rows} x {length:,} tokens"


def _or_error(say: Callable[[Row], str]) -> Callable[[Row], str]:
    def said(row: Row) -> str:
        return f"{row['model']}, {row['what']}: {row['error']}." if "error" in row else say(row)

    return said


SAID = {
    "evaluate": _or_error(_evaluate),
    "literal": _or_error(_literal),
    "training": _or_error(_training),
}
"""What is no cell of a table but a sentence."""
