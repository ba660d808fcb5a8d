"""What ``figures.py`` says of methods side by side: cost, the peers, the search."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from exit_variants import EVERY
from peer_losses import METHODS

from softtrace import DensityOptions

HERE = Path(__file__).resolve().parent


def read(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


def quartiles(found: dict[str, float]) -> str:
    """A median and the quartiles around it."""
    return "{median:.2f} ({q25:.2f} to {q75:.2f})".format(**found)


def cost() -> str:
    """Time and memory of a step with each method's loss, by size of the model."""
    names = ("peers-cost", "peers-107m-cost", "peers-157m-cost", "peers-270m-cost")
    results = [read(f"{name}.json") for name in names]
    head = " | ".join(f"{each['settings']['model']}: time | memory" for each in results)
    lines = [f"| loss | {head} |", "|---" * (1 + 2 * len(results)) + "|"]
    for method in dict.fromkeys(method for each in results for method in each["cost"]):
        if method not in METHODS:
            continue  # of the search: see LOG.md
        cells = []
        for row in (each["cost"].get(method) for each in results):
            if row is None:
                cells += ["", ""]
                continue
            cells += [quartiles(row["time"]), f"{row['memory']:.2f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    sizes = "; ".join(
        dict.fromkeys(
            f"{settings['batch_size']} x {settings['block_size']} tokens on {each['hardware']}"
            + (", bfloat16" if settings["bf16"] else "")
            for each in results
            for settings in [each["settings"]]
        )
    )
    files = ", ".join(f"[{name}.json](benchmarks/{name}.json)" for name in names)
    lines.append(
        f"\nInterleaved steps, over plain ones (quartiles): {sizes}; peak memory over plain "
        f"([peers.py --cost](benchmarks/peers.py), {files}). On a GPU each was timed on a card of "
        "its own while other work ran on the machine's others. Cost does not depend on what a "
        "model has learned; `pretrain.py --steps 1` makes random ones: 16 and 24 layers of width "
        "768, 24 of width 1,024."
    )
    return "\n".join(lines)


def cost_quiet() -> str:
    """The same where nothing else ran, and with masked runs less often."""
    sizes = ("107m", "157m", "270m")
    results = [read(f"peers-{size}-cost-quiet.json") for size in sizes]
    settings, first = results[0]["settings"], results[0]["cost"]
    head = " | ".join(f"{each['settings']['model']}: time | memory" for each in results)
    lines = [f"| loss | {head} |", "|---" * (1 + 2 * len(results)) + "|"]
    titles = {
        "10th": "softtrace, masked runs at every 10th step",
        "10th, share 0.375": "the same on 37.5 % of the windows",
    }
    for method in first:
        rows = [each["cost"][method] for each in results]
        cells = (f"{quartiles(row['time'])} | {row['memory']:.2f}" for row in rows)
        lines.append(f"| {titles.get(method, method)} | {' | '.join(cells)} |")
    lines.append(
        f"\nEach on a card of its own, nothing else at work but these three; "
        f"{settings['batch_size']} x {settings['block_size']} tokens, "
        f"{first['plain']['rounds']} rounds; {results[0]['hardware']} "
        "([peers.py --cost](benchmarks/peers.py), peers-\\*-cost-quiet.json)."
    )
    return "\n".join(lines)


def operations() -> str:
    """What a step costs where launches are all that counts."""
    result = read("operations.json")
    plain, exits, masked = (
        result["operations"][name]["all"] for name in ("plain", "exits read", "masked runs")
    )
    every = DensityOptions().on(torch.device("cuda")).every
    whole = (exits + (masked - exits) / every) / plain
    return (
        f"A plain step of a {result['settings']['pattern']} of {result['settings']['layers']} "
        f"layers is {plain:,} operations, one whose exits are read {exits:,}, one with masked runs "
        f"{masked:,}: with masked runs at every {every}th step {whole:.2f} times a plain one's, "
        "which is what it costs on a GPU where launches are all that counts ([operations.py]"
        "(benchmarks/operations.py), [operations.json](benchmarks/operations.json))."
    )


PEER_COLUMNS = (
    ("area_easy", "area, easy", "{:.3f}"),
    ("size_easy", "size, easy", "{:.3%}"),
    ("size_hard", "size, hard", "{:.2%}"),
    ("exit_easy", "exits agree, easy", "{:.1%}"),
    ("exit_all", "exits agree, all", "{:.1%}"),
    ("accepted", "accepted of 4, half", "{:.2f}"),
    ("accepted_quarter", "quarter", "{:.2f}"),
)


def _peers(name: str, folder: str = "benchmarks/") -> str:
    """Every method where its front meets +1 % of plain fine-tuning's held-out loss."""
    result = read(f"{name}.json")
    lines = [
        "| at +1 % held-out loss | " + " | ".join(title for _, title, _ in PEER_COLUMNS) + " |",
        "|---" * (len(PEER_COLUMNS) + 1) + "|",
    ]
    for method, row in result["at_budget"].items():
        cells = (form.format(row[key]) for key, _, form in PEER_COLUMNS)
        bold = "**" if method == "softtrace" else ""
        lines.append(f"| {bold}{method}{bold} | {' | '.join(cells)} |")
    settings, runs = result["settings"], result["runs"]
    seeds = {method: _whole_seeds(runs, method) for method in result["at_budget"]}
    counts = ", ".join(f"{m} {n}" for m, n in seeds.items())
    where = [run.get("hardware", result["hardware"]).partition(",")[0] for run in runs]
    machines = dict.fromkeys(where)
    places = [
        machine + ("" if len(machines) == 1 else f" ({where.count(machine)} runs)")
        for machine in machines
    ]
    shown = str(next(iter(seeds.values()))) if len(set(seeds.values())) == 1 else counts
    lines.append(
        f"\n{settings['model']} on {settings['data']}'s source, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens, {len(runs)} runs, paired "
        f"seeds: {shown}; {', '.join(places)} ([peers.py]({folder}peers.py), "
        f"[{name}.json]({folder}{name}.json))."
    )
    return "\n".join(lines)


def _whole_seeds(runs: list[dict[str, Any]], method: str) -> int:
    """Seeds that every strength of a method was run with."""
    of = [(run["strength"], run["seed"]) for run in runs if run["method"] == method]
    return min(
        sum(strength == each for each, _ in of) for strength in {strength for strength, _ in of}
    )


def peers() -> str:
    """The comparison at the shipped model's size."""
    return _peers("peers")


def peers_large() -> str:
    """The comparison at a larger one, with a short schedule."""
    return _peers("peers-large", "")


def ratios(runs: list[dict[str, Any]], rows: list[dict[str, Any]], key: str) -> list[float]:
    """Of paired runs over plain fine-tuning's."""
    plain = {run["seed"]: run for run in runs if run["method"] == "plain"}
    return [row[key] / plain[row["seed"]][key] for row in rows]


def _points(name: str, folder: str = "benchmarks/") -> str:
    """Every method and strength of a result file, over plain fine-tuning."""
    result = read(f"{name}.json")
    settings, runs, order = result["settings"], result["runs"], list(EVERY)
    lines = [
        "| loss, strength | held-out loss | area, easy | size, easy | size, hard "
        "| exits agree, easy | exits agree, all | accepted of 4, half | quarter | seeds |",
        "|---" * 10 + "|",
    ]
    points = dict.fromkeys((run["method"], run["strength"]) for run in runs)
    for method, strength in sorted(points, key=lambda point: (order.index(point[0]), point[1])):
        rows = [run for run in runs if (run["method"], run["strength"]) == (method, strength)]
        loss = [100 * (ratio - 1) for ratio in ratios(runs, rows, "loss")]
        spread = f" ({min(loss):+.2f} to {max(loss):+.2f})" if any(loss) and rows[1:] else ""
        over = (
            f"x{statistics.mean(ratios(runs, rows, key)):.3f}"
            for key in ("area_easy", "size_easy", "size_hard")
        )
        means = (
            form.format(statistics.mean(row[key] for row in rows))
            for key, _, form in PEER_COLUMNS[3:]
        )
        bold = "**" if (method, strength) == ("softtrace", DensityOptions().strength) else ""
        named = f"{bold}{method}{f', {strength:g}' if strength else ''}{bold}"
        cells = (f"{statistics.mean(loss):+.2f} %{spread}", *over, *means)
        lines.append(f"| {named} | {' | '.join(cells)} | {len(rows)} |")
    lines.append(
        "\nMeans of paired seeds; loss (smallest to largest), area and sizes over plain "
        f"fine-tuning's; {settings['model']} on {settings['data']}'s source, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens; "
        f"{result['hardware']} "
        f"([peers.py]({folder}peers.py), [{name}.json]({folder}{name}.json))."
    )
    return "\n".join(lines)


def peers_107m() -> str:
    """The comparison at a larger size, with a longer schedule."""
    return _points("peers-107m")


def peers_157m() -> str:
    """The comparison with a deeper model."""
    return _points("peers-157m")


def peers_157m_again() -> str:
    """Of another start, against the other peer with good exits."""
    return _points("peers-157m-again")


def drafting_depths() -> str:
    """Exits at one depth only, for drafting."""
    return _points("drafting-depths-107m", "")


def search() -> str:
    """Variants of the term, paired with plain fine-tuning."""
    return _search("search")


def search_exits() -> str:
    """How often the term comes, and which exits."""
    return _search("search-exits")


def search_seldom() -> str:
    """Masked runs at every 8th step, and exits that do not get heavier with the strength."""
    return _search("search-seldom")


def search_judged() -> str:
    """What exits are judged by, what learns from them, and when."""
    return _search("search-judged")


def search_shapes() -> str:
    """How thresholds are drawn, and the edge of masks and of easiness."""
    return _search("search-shapes")


def _search(name: str) -> str:
    result = read(f"{name}.json")
    runs = result["runs"]
    plain = {run["seed"]: run for run in runs if run["method"] == "plain"}
    lines = [
        "| variant | strength | loss | area | size | size, hard | exit | exit, all | accepted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    points = {(run["method"], run["strength"]): [] for run in runs}  # type: ignore[var-annotated]
    for run in runs:
        points[run["method"], run["strength"]].append(run)
    for (variant, strength), rows in points.items():
        keys = ("loss", "area_easy", "size_easy", "size_hard")
        loss, area, size, hard = (statistics.mean(ratios(runs, rows, key)) for key in keys)
        exits, everywhere, accepted = (
            statistics.mean(row[key] for row in rows)
            for key in ("exit_easy", "exit_all", "accepted")
        )
        lines.append(
            f"| {variant} | {strength:g} | {loss - 1:+.2%} | {area:.3f} | {size:.3f} | {hard:.2f} "
            f"| {exits:.3f} | {everywhere:.3f} | {accepted:.2f} |"
        )
    settings = result["settings"]
    lines.append(
        f"\nPaired seeds: {len(plain)}; loss, area and sizes over plain fine-tuning's; "
        f"{settings['model']} on {settings['data']}, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens, {result['hardware']} "
        f"([{name}.json]({name}.json))."
    )
    return "\n".join(lines)
