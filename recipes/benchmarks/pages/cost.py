"""What the pages say of the cost of a step."""

from __future__ import annotations

from typing import Any

import torch

from recipes.benchmarks.comparison.peer_losses import METHODS
from recipes.benchmarks.pages.comparison import quartiles
from recipes.benchmarks.pages.sources import CARD, link, read, sources
from softtrace import DensityOptions

#: those of the code that ships
MODELS = ("pystdlib-4m", "random-107m", "random-157m", "random-270m")
#: losses as the table calls them; others of the search are in the log
TITLES = {
    **{name: name for name in METHODS},
    "10th": "softtrace, masked runs at every 10th step",
    "10th, share 0.375": "the same on 37.5 % of the windows",
}


def cost() -> str:
    """Time and memory of a step with each method's loss, by size of the model."""
    measured = [each for each in read("cost.json")["measurements"] if each["model"] in MODELS]
    head = " | ".join(f"{model}: time | memory" for model in MODELS)
    lines = [
        f"| loss | neighbours at work | {head} |",
        "|---" * (2 + 2 * len(MODELS)) + "|",
    ]
    for method, title in TITLES.items():
        for neighbours, shown in ((False, "no"), (True, "yes"), (None, "not noted")):
            if method == "plain" and neighbours is not False:
                continue  # 1 by definition
            cells = [_cells(measured, model, neighbours, method) for model in MODELS]
            if any(time for time, _ in cells):
                found = " | ".join(f"{time} | {memory}" for time, memory in cells)
                lines.append(f"| {title} | {shown} | {found} |")
    sizes = "; ".join(
        dict.fromkeys(
            f"{each['batch_size']} x {each['block_size']} tokens on {each['hardware']}"
            + (", bfloat16" if each["precision"].startswith("bfloat16") else "")
            for each in measured
            if each["hardware"] == _usual(measured, each["model"])
        )
    )
    script = link(CARD, "comparison/peers.py", "peers.py --cost")
    lines.append(
        f"\nInterleaved steps, over plain ones (quartiles): {sizes}; peak memory over plain "
        f"({script}, {link(CARD, 'results/cost.json')}). A line for each measurement, the earliest "
        f"first. Medians of the default over all of them: {_ranges(measured)}. On a GPU each was "
        "timed on a card of its own; neighbours are other work on the machine's others, timings "
        "of the other sizes left out. Cost does not depend on what a model has learned; "
        "`pretrain.py --steps 1` makes random ones: 16 and 24 layers of width 768, 24 of width "
        "1,024."
    )
    return "\n".join(lines)


def _usual(measured: list[dict[str, Any]], model: str) -> str:
    """The machine of a model's first measurement; others are named where they come."""
    first = next(each for each in measured if each["model"] == model)
    return str(first["hardware"])


def _cells(
    measured: list[dict[str, Any]], model: str, neighbours: bool | None, method: str
) -> tuple[str, str]:
    """Time and memory of a loss, a line for each measurement."""
    found = []
    for each in measured:
        row = each["cost"].get(method)
        other = (each["model"], each["neighbours"]) != (model, neighbours)
        if other or row is None or "too_high" in row:
            continue
        usual = each["hardware"] == _usual(measured, model)
        where = "" if usual else f", {each['hardware']}"
        found.append((quartiles(row["time"]) + where, f"{row['memory']:.2f}"))
    if method == "plain":
        found = found[:1]
    return "<br>".join(time for time, _ in found), "<br>".join(memory for _, memory in found)


def _ranges(measured: list[dict[str, Any]]) -> str:
    """The smallest and the largest median of the default at each size."""
    found = []
    for model in MODELS:
        rows = [each["cost"]["softtrace"] for each in measured if each["model"] == model]
        medians = [row["time"]["median"] for row in rows]
        found.append(f"{model} {min(medians):.2f} to {max(medians):.2f} ({len(medians)})")
    return ", ".join(found)


def operations() -> str:
    """What a step costs where launches are all that counts."""
    result = read("operations.json")
    plain, exits, masked = (
        result["operations"][name]["all"] for name in ("plain", "exits read", "masked runs")
    )
    every = DensityOptions(cuda_graph=False).on(torch.device("cuda")).every
    whole = (exits + (masked - exits) / every) / plain
    return (
        f"A plain step of a {result['settings']['pattern']} of {result['settings']['layers']} "
        f"layers is {plain:,} operations, one whose exits are read {exits:,}, one with masked runs "
        f"{masked:,}: with masked runs at every {every}th step {whole:.2f} times a plain one's, "
        "which is what it costs on a GPU where launches are all that counts and none are captured "
        f"{sources(CARD, 'speed/operations.py', 'results/operations.json')}."
    )


def sharded() -> str:
    """What a step costs where FSDP2 shards the model, and how it scales with processes."""
    result = read("sharded.json")
    measured = [(name, row) for name, kinds in result["models"].items() for row in kinds.values()]
    measured.sort(key=lambda each: (list(result["models"]).index(each[0]), *_kind_of(each[1])))
    lines = [
        "| random weights of the size of | | processes | time | memory of a process "
        "| tokens a second, plain | with the term |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, row in measured:
        memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
        alone = result["models"][model].get(f"1 processes, {row['kind']}")
        exits = "" if row["exits read"] else ", no exits read"
        speeds = " | ".join(_speed(row, alone, way) for way in ("plain", "default"))
        lines.append(
            f"| {model} | {row['kind']}{exits} | {row['processes']} | {quartiles(row['time'])} "
            f"| {memory} | {speeds} |"
        )
    rounds = sorted({row["rounds"] for _, row in measured})
    batches = " and ".join(
        f"{count} x {length:,}"
        for count, length in dict.fromkeys(tuple(row["batch"]) for _, row in measured)
    )
    hardware = " and ".join(dict.fromkeys(row["hardware"] for _, row in measured))
    torches = " and ".join(dict.fromkeys(row["versions"]["torch"] for _, row in measured))
    gpu = torch.device("cuda")
    seldom = DensityOptions(cuda_graph=False).on(gpu).every
    often = DensityOptions().on(gpu).every
    lines.append(
        f"\nA step with the default term over a plain one (quartiles of "
        f"{' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} interleaved turns "
        f"of {result['steps_a_turn']} steps), {batches} tokens a process. **Masked runs come at "
        f"every {seldom}th step here**, which is the default of a sharded model: its units let go "
        f"of their weights, so no CUDA graph can be made of its masked runs; where one can, on a "
        f"GPU that has the whole model, they come at every {often}nd. Where it is compiled, "
        "every layer by itself, over a compiled plain step. In brackets: tokens a second over "
        "those of one process, of the same kind and on the same hardware. "
        f"{result['precision'].capitalize()}, {hardware}, torch {torches} "
        f"{sources(CARD, 'speed/sharded.py', 'results/sharded.json')}."
    )
    return "\n".join(lines)


def fitted() -> str:
    """What ``softtrace fit`` itself took with a configuration for several GPUs."""
    result = read("fitted.json")
    lines = [
        f"- `configs/{config}.yaml`: {row['steps']} steps, {row['peak GB']:.1f} GB of a GPU (1e9 "
        f"bytes) at most, {row['seconds of the command']:.0f} s for the whole command; what it "
        f"saved is {'a whole model' if row['whole'] else '**not a whole model**'}"
        for config, row in result["configs"].items()
    ]
    lines.append(
        f"\nRandom weights, {result['hardware']}, torch {result['versions']['torch']} "
        f"{sources(CARD, 'speed/fitted.py', 'results/fitted.json')}."
    )
    return "\n".join(lines)


def _kind_of(row: dict[str, Any]) -> tuple[bool, str, int]:
    """In which order rows of a model come: what is compiled last, then by processes."""
    return "compiled" in row["kind"], row["kind"], row["processes"]


def _speed(row: dict[str, Any], alone: dict[str, Any] | None, way: str) -> str:
    """Tokens a second of all processes together, and over those of one where it was measured."""
    own = _tokens_a_second(row, way)
    comparable = alone is not None and all(alone[key] == row[key] for key in ("hardware", "batch"))
    if alone is None or not comparable or row["processes"] == 1:
        return f"{own:,.0f}"
    return f"{own:,.0f} ({own / _tokens_a_second(alone, way):.2f})"


def _tokens_a_second(row: dict[str, Any], way: str) -> float:
    count, length = row["batch"]
    return float(row["processes"] * count * length / row["seconds"][way]["median"])
