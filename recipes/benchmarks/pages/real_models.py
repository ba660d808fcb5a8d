"""What the pages say of real pretrained models: presets, ways to train, a step's cost."""

from __future__ import annotations

from typing import Any

from recipes.benchmarks.pages.sources import CARD, README, read, sources
from softtrace.loss.options import PRESETS

#: preset -> the way of ``on_real_models.py`` that has its options
PRESET_WAYS = {
    "balanced": "every 2nd, 0.35",
    "sparse": "every 2nd, 0.35, no exits",
    "decode": "every 2nd, 0.1, more exits",
}
_HEAD = (
    "| {first} | held-out loss | area, easy, 256 tokens | 1,024 | size, easy, 256 | 1,024 | "
    "area and entropy, 256 | 1,024 | exits agree, easy, 256 |\n" + "|---" * 9 + "|"
)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read("on_real_models.json")["table"]
    return sorted(rows, key=lambda row: row["loss"]["mean"])


def _row(name: str, row: dict[str, Any]) -> str:
    short, long = row["256 recomputed"], row["1024 recomputed"]
    cells = [
        f"{100 * (row['loss']['mean'] - 1):+.2f} %",
        *(f"{at['area_easy']['mean']:.3f}" for at in (short, long)),
        *(f"{100 * at['size_easy']['mean']:.2g} %" for at in (short, long)),
        *(f"{at['spearman']['mean']:+.2f}" for at in (short, long)),
        f"{100 * short['exit_easy']['mean']:.0f} %",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _said(page: str) -> str:
    result = read("on_real_models.json")
    row, run = result["table"][0], result["runs"][0]
    return (
        f"{row['model']} on {row['text']}, {row['steps']} steps of 16 x 512 tokens, "
        f"{row['seeds']} seed: a lead, not a result. Attention recomputed, easy quarter of the "
        "tokens, median size at TV 0.2, exits at half depth; loss over plain fine-tuning's; "
        f"{run['hardware']} {sources(page, *_SOURCES)}."
    )


_SOURCES = ("comparison/on_real_models.py", "results/on_real_models.json")


def presets() -> str:
    """Each preset's options and its row on a real model."""
    found = {row["method"]: row for row in _rows()}
    lines = [_HEAD.format(first="preset"), _row("plain fine-tuning", found["plain"])]
    for name, options in PRESETS.items():
        shown = ", ".join(f"{key}={value:g}" for key, value in options.items())
        lines.append(_row(f'`"{name}"` ({shown})', found[PRESET_WAYS[name]]))
    return "\n".join([*lines, "", _said(README)])


def on_real_models() -> str:
    """Every way that was tried, by held-out loss."""
    rows = [_row(row["method"], row) for row in _rows()]
    return "\n".join([_HEAD.format(first="masked runs, strength"), *rows, "", _said(CARD)])


def steps() -> str:
    """What a step costs at the sizes of real models."""
    result = read("steps.json")
    lines = ["| random weights of the size of | step | time | memory |", "|---|---|---|---|"]
    for model, found in result["models"].items():
        for kind in ("eager", "compiled"):
            for way, row in found.get(kind, {}).items():
                time = row["time"]
                lines.append(
                    f"| {model}, {kind} | {way} | {time['median']:.2f} ({time['q25']:.2f} to "
                    f"{time['q75']:.2f}) | {row['memory']:.2f} |"
                )
    (rounds,) = {row["rounds"] for row in result["models"]["SmolLM2-135M"]["eager"].values()}
    error = result["models"]["SmolLM2-135M"]["replayed, float32"]
    return "\n".join([
        *lines,
        "",
        f"Over a plain step (quartiles of {rounds} interleaved turns of {result['steps_a_turn']} "
        f"steps), {result['batch'][0]} x {result['batch'][1]} tokens, {result['precision']}, "
        f"{result['hardware']}, torch {result['versions']['torch']}. A replayed term equals the "
        f"same term run as it is (largest relative difference {error['term']:g}), its gradients "
        f"to {error['gradients']:.0e} in float32 "
        f"{sources(CARD, 'speed/steps.py', 'results/steps.json')}.",
    ])  # fmt: skip
