"""What the pages say of methods side by side: the peers, the search."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from recipes.benchmarks.comparison.exit_variants import EVERY
from recipes.benchmarks.pages.sources import LOG, link, read, sources
from softtrace import DensityOptions
from softtrace.percent import percent


def quartiles(found: dict[str, float]) -> str:
    """A median and the quartiles around it."""
    return "{median:.2f} ({q25:.2f} to {q75:.2f})".format(**found)


PEER_COLUMNS = (
    ("area_easy", "area, easy", "{:.3f}".format),
    ("size_easy", "size, easy", partial(percent, decimals=3)),
    ("size_hard", "size, hard", partial(percent, decimals=2)),
    ("exit_easy", "exits agree, easy", partial(percent, decimals=1)),
    ("exit_all", "exits agree, all", partial(percent, decimals=1)),
    ("accepted", "accepted of 4, half", "{:.2f}".format),
    ("accepted_quarter", "quarter", "{:.2f}".format),
)


def at_budget(page: str, name: str) -> str:
    """Every method where its front meets +1 % of plain fine-tuning's held-out loss."""
    result = read(f"{name}.json")
    lines = [
        "| at +1 % held-out loss | " + " | ".join(title for _, title, _ in PEER_COLUMNS) + " |",
        "|---" * (len(PEER_COLUMNS) + 1) + "|",
    ]
    for method, row in result["at_budget"].items():
        cells = (form(row[key]) for key, _, form in PEER_COLUMNS)
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
        "\nAccepted of 4: of four guesses by an exit after half or a quarter of the layers, those "
        "that the whole model accepts. "
        f"{settings['model']} on {settings['data']}'s source, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens, {len(runs)} runs, paired "
        f"seeds: {shown}; {', '.join(places)} "
        f"{sources(page, 'comparison/peers.py', f'results/{name}.json')}."
    )
    return "\n".join(lines)


def _whole_seeds(runs: list[dict[str, Any]], method: str) -> int:
    """Seeds that every strength of a method was run with."""
    of = [(run["strength"], run["seed"]) for run in runs if run["method"] == method]
    return min(
        sum(strength == each for each, _ in of) for strength in {strength for strength, _ in of}
    )


def ratios(runs: list[dict[str, Any]], rows: list[dict[str, Any]], key: str) -> list[float]:
    """Of paired runs over plain fine-tuning's."""
    plain = {run["seed"]: run for run in runs if run["method"] == "plain"}
    return [row[key] / plain[row["seed"]][key] for row in rows]


def points(page: str, name: str) -> str:
    """Every method and strength of a result file, over plain fine-tuning."""
    result = read(f"{name}.json")
    settings, runs, order = result["settings"], result["runs"], list(EVERY)
    lines = [
        "| loss, strength | held-out loss | area, easy | size, easy | size, hard "
        "| exits agree, easy | exits agree, all | accepted of 4, half | quarter | seeds |",
        "|---" * 10 + "|",
    ]
    ways = dict.fromkeys((run["method"], run["strength"]) for run in runs)
    for method, strength in sorted(ways, key=lambda point: (order.index(point[0]), point[1])):
        rows = [run for run in runs if (run["method"], run["strength"]) == (method, strength)]
        loss = [100 * (ratio - 1) for ratio in ratios(runs, rows, "loss")]
        spread = f" ({min(loss):+.2f} to {max(loss):+.2f})" if any(loss) and rows[1:] else ""
        over = (
            f"x{statistics.mean(ratios(runs, rows, key)):.3f}"
            for key in ("area_easy", "size_easy", "size_hard")
        )
        means = (
            form(statistics.mean(row[key] for row in rows)) for key, _, form in PEER_COLUMNS[3:]
        )
        bold = "**" if (method, strength) == ("softtrace", DensityOptions().strength) else ""
        named = f"{bold}{method}{f', {strength:g}' if strength else ''}{bold}"
        cells = (percent(statistics.mean(loss) / 100, 2, signed=True) + spread, *over, *means)
        lines.append(f"| {named} | {' | '.join(cells)} | {len(rows)} |")
    lines.append(
        "\nMeans of paired seeds; loss (smallest to largest), area and sizes over plain "
        f"fine-tuning's; {settings['model']} on {settings['data']}'s source, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens; "
        f"{result['hardware']} {sources(page, 'comparison/peers.py', f'results/{name}.json')}."
    )
    return "\n".join(lines)


def search(name: str) -> str:
    """Variants of the term, paired with plain fine-tuning."""
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
            f"| {variant} | {strength:g} | {percent(loss - 1, 2, signed=True)} | {area:.3f} "
            f"| {size:.3f} | {hard:.2f} | {exits:.3f} | {everywhere:.3f} | {accepted:.2f} |"
        )
    settings = result["settings"]
    lines.append(
        f"\nPaired seeds: {len(plain)}; loss, area and sizes over plain fine-tuning's; "
        f"{settings['model']} on {settings['data']}, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens, {result['hardware']} "
        f"({link(LOG, f'results/{name}.json')})."
    )
    return "\n".join(lines)
