"""What the pages say of memory and time of long texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.benchmarks.pages.comparison import quartiles
from recipes.benchmarks.pages.sources import CARD, read, sources
from recipes.benchmarks.places import RESULTS

Row = dict[str, Any]
STORED = {
    "importances": ("importance", False),
    "curve of 64, stored is the curve": ("curve of 64, recorded", False),
    "curve of 64, stored are its importances too": ("curve of 64, recorded", True),
}
"""What is read as stored: the row, and whether the importances of as many tokens count too."""
MASKED_LIMIT, STEP_LIMIT = 1.3, 1.3
"""Aims: time over masked runs', a step over a plain one."""
FILES, PLOT = ("lengths.json", "lengths-cpu.json"), "lengths.png"
FLEX = "flex.json"


def lengths() -> str:
    """Memory and time by the length of the text, a table a device, and what is asked of one."""
    rows = [row for name in FILES for row in read(name)["rows"]]
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        parts.append(_table([row for row in own if row["what"] not in SAID], device))
        said = [SAID[row["what"]](row) for row in own if row["what"] in SAID]
        said += _over_masked(own) + _given_up(own)
        parts += ["\n".join(f"- {each}" for each in said)] if said else []
        parts.append(_over_forward(own))
    if (RESULTS / PLOT).exists():  # drawn by the script, where it measured last
        parts.append(f"![Memory and seconds by the length]({CARD}results/{PLOT})")
    if (RESULTS / FLEX).exists():
        parts.append(_flex(read(FLEX)))
    files = (f"results/{name}" for name in FILES)
    parts.append(sources(CARD, "speed/lengths.py", *files))
    return "\n\n".join(parts)


def _flex(found: Row) -> str:
    """What FlexAttention gives beside masked attention block by block."""
    said = (
        f"{row['layer']}, {row['length']:,} tokens, {row['dtype']}: largest difference "
        f"{row['largest_difference']:.1e} of outputs up to {row['largest_output']:.2g}, "
        f"{row['flipped_share']:.2g} of the kept edges flip, "
        f"{1000 * row['seconds of flex']:.3g} ms against our "
        f"{1000 * row['seconds of ours']:.3g} ms."
        for row in found["rows"]
    )
    lines = "\n".join(f"- {each}" for each in said)
    cited = sources(CARD, "speed/flex.py", f"results/{FLEX}")
    return (
        f"Masked attention of one layer by FlexAttention, on an {found['hardware']} {cited}:\n\n"
        f"{lines}"
    )


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
        f"{alone['seconds']:.2f} s, and {extra['seconds']:.1f} s with baselines of every block: "
        f"{alone['over_masked_runs']:.2f} and {extra['over_masked_runs']:.2f} times as long as its "
        f"masked runs (aim: {MASKED_LIMIT}), "
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
        f"{quartiles(row['default']['over_plain'])} times a plain one with sdpa "
        f"attention{_kernel(row)} (aim: {STEP_LIMIT}), with "
        f"windows of whole rows {quartiles(row['whole rows']['over_plain'])} (quartiles of "
        f"{row['turns']} interleaved turns, {row['precision']})."
    )


def _kernel(row: Row) -> str:
    """By which operator it was computed, where that is known."""
    names = [name for name in row.get("attention of plain", ()) if not name.endswith("_backward")]
    return f" (`{'`, `'.join(names)}`)" if names else ""


def _over_forward(rows: list[Row]) -> str:
    """A table: memory of importances and of curves of chosen positions over that of a forward."""
    by = {(row["model"], row["what"], row["length"]): row for row in rows if "peak_gib" in row}
    columns = sorted({length for _, _, length in by})
    lines = [
        "| most memory less what is stored of the result, over a forward's | "
        f"{' | '.join(f'{length:,} tokens' for length in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        for name, (what, also) in STORED.items():
            cells = []
            for length in columns:
                forward, own = (by.get((model, each, length)) for each in ("forward", what))
                beside = by.get((model, "importance", length)) if also else None
                if forward is None or own is None or (also and beside is None):
                    cells.append("")
                    continue
                stored = own["held_gib"] + (0 if beside is None else beside["held_gib"])
                cells.append(f"{(own['peak_gib'] - stored) / forward['peak_gib']:.1f}")
            if any(cells):
                lines.append(f"| {model}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_masked(rows: list[Row]) -> list[str]:
    """Seconds of curves over those of their masked forwards."""
    said = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and "masked_runs" in row]
        for what in dict.fromkeys(row["what"] for row in own):
            each = (
                f"{row['over_masked_runs']:.2f} at {row['length']:,} tokens "
                f"({row['masked_seconds']:.3g} s of {row['seconds']:.3g})"
                for row in own
                if row["what"] == what
            )
            said.append(f"{model}, {what}: seconds over its masked forwards, {'; '.join(each)}.")
    return said


def _given_up(rows: list[Row]) -> list[str]:
    """Rows that found nothing, and why."""
    return [
        f"{row['model']}, {row['what']}, {row['length']:,} tokens: {row['error']}."
        for row in rows
        if "error" in row and row["what"] not in SAID
    ]


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
