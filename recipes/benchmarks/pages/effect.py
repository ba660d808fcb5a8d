"""What the pages say of the effect, and of what a penalty changes besides."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from recipes.benchmarks.pages.sources import CARD, read, sources
from softtrace.percent import percent

LOSS_ROW = ("loss", "held-out loss, nats/token", "{:.3f}".format)

EFFECT_ROWS = (
    LOSS_ROW,
    ("area_easy", "area, easy tokens", "{:.3f}".format),
    ("size_easy", "median size at TV 0.2, easy tokens", partial(percent, decimals=2)),
    (
        "exit_easy",
        "exits after half of the layers that agree, easy tokens",
        partial(percent, decimals=1),
    ),
    ("area_all", "area, all tokens", "{:.3f}".format),
    ("size_all", "median size at TV 0.2, all tokens", partial(percent, decimals=2)),
    ("size_hard", "median size at TV 0.2, hard tokens", partial(percent, decimals=2)),
)

SIDE_ROWS = (
    ("area_hard", "area, hard tokens", "{:.3f}".format),
    ("size_hard", "median size at TV 0.2, hard tokens", partial(percent, decimals=2)),
    ("loss_rare", "loss on the rarest tenth of the tokens, nats", "{:.3f}".format),
    ("loss_elsewhere", "loss on the text of pretraining, nats/token", "{:.3f}".format),
    ("calibration_error", "expected calibration error", "{:.4f}".format),
)

Rows = tuple[tuple[str, str, Callable[[float], str]], ...]


def paired(rows: Rows, title: str, values: dict[str, dict[str, list[float]]]) -> list[str]:
    """A table of paired seeds: plain fine-tuning, another one, and their ratio.

    Args:
        rows: key, name and way to write each measure.
        title: of the other one.
        values: of "plain" and "other", for each key one a seed.
    """
    seeds = len(next(iter(values["plain"].values())))
    lines = [
        f"| mean of {seeds} paired seeds | plain | {title} | ratio (smallest to largest) |",
        "|---|---|---|---|",
    ]
    for key, name, form in rows:
        plain, other = values["plain"][key], values["other"][key]
        ratios = [a / b for a, b in zip(other, plain, strict=True)]
        means = " | ".join(form(statistics.mean(each)) for each in (plain, other))
        lines.append(
            f"| {name} | {means} "
            f"| {statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    return lines


def of_effect(rows: Rows) -> list[str]:
    """Those of ``effect.json``, with the default penalty."""
    arms = read("effect.json")["arms"]
    values = {
        name: {key: arms[arm][key]["values"] for key, _, _ in rows}
        for name, arm in (("plain", "plain"), ("other", "penalty"))
    }
    return paired(rows, "penalty", values)


def effect() -> str:
    """What the penalty does to the measures."""
    result = read("effect.json")
    settings = result["settings"]
    lines = [
        *of_effect(EFFECT_ROWS),
        f"\n{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} "
        f"tokens of {result['data']}'s source, on which no setting was tuned but the strength "
        f"(lowered from 0.45 after one seed), at learning rate {settings['lr']:g}; "
        f"{result['explained_positions']:,} held-out positions measured with 32 to 62 tokens of "
        "context, attention recomputed; "
        f"{result['hardware']}, torch {result['versions']['torch']} "
        f"{sources(CARD, 'comparison/effect.py', 'results/effect.json')}.",
    ]
    return "\n".join(lines)


def side_effects() -> str:
    """What the penalty might hurt unseen."""
    runs = "[the effect on the shipped model](results.md#effect-on-the-shipped-model)"
    said = f"\nFrom the runs of {runs} {sources(CARD, 'comparison/effect.py')}."
    return "\n".join([*of_effect(SIDE_ROWS), said])


def _with_exits_first(name: str, rows: Rows) -> str:
    """What exits first change besides, from a result file of ``peers.py``."""
    result = read(f"{name}.json")
    runs, settings = result["runs"], result["settings"]
    values = {
        each: {
            key: [run[key] for seed in range(3) for run in runs
                  if (run["method"], run["seed"]) == (method, seed)]
            for key, _, _ in rows
        }
        for each, method in (("plain", "plain"), ("other", "softtrace, exits first"))
    }  # fmt: skip
    lines = paired(rows, "exits first, 0.15", values)
    lines.append(
        f"\n{settings['model']} on {settings['data']}'s source, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens; {result['hardware']} "
        f"{sources(CARD, 'comparison/peers.py', f'results/{name}.json')}."
    )
    return "\n".join(lines)


def side_effects_first() -> str:
    """The same with exits first."""
    return _with_exits_first("peers-side-effects", (LOSS_ROW, *SIDE_ROWS))


def side_effects_157m() -> str:
    """The same of a larger model, which has never seen the standard library."""
    rows = tuple(
        (key, name.replace("text of pretraining", "standard library"), form)
        for key, name, form in (LOSS_ROW, *SIDE_ROWS)
    )
    return _with_exits_first("peers-157m-layerskip", rows)
