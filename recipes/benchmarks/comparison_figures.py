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


def cost() -> str:
    """Time and memory of a step with each method's loss, by size of the model."""
    names = ("peers-cost", "peers-107m-cost", "peers-270m-cost")
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
            time = row["time"]
            cells.append(f"{time['median']:.2f} ({time['q25']:.2f} to {time['q75']:.2f})")
            cells.append(f"{row['memory']:.2f}")
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
        f"([peers.py --cost](benchmarks/peers.py), {files})."
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


def _ratios(runs: list[dict[str, Any]], rows: list[dict[str, Any]], key: str) -> list[float]:
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
        loss = [100 * (ratio - 1) for ratio in _ratios(runs, rows, "loss")]
        spread = f" ({min(loss):+.2f} to {max(loss):+.2f})" if any(loss) and rows[1:] else ""
        over = (
            f"x{statistics.mean(_ratios(runs, rows, key)):.3f}"
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
        f"fine-tuning's; "
        f"{settings['model']} on {settings['data']}'s source, {settings['steps']} steps of "
        f"{settings['batch_size']} x {settings['block_size']} tokens; {result['hardware']} "
        f"([peers.py]({folder}peers.py), [{name}.json]({folder}{name}.json))."
    )
    return "\n".join(lines)


def peers_107m() -> str:
    """The comparison at a larger size, with a longer schedule."""
    return _points("peers-107m")


def drafting_depths() -> str:
    """Exits at one depth only, for drafting."""
    return _points("drafting-depths-107m", "")


#: the models that raced in three seeds (the last two in one), and what they were fine-tuned with
RACED = {
    "plain": ("plain", 0.0, "peers-107m", "nothing added"),
    "default": ("softtrace", 0.35, "peers-107m", "softtrace, default"),
    "more": ("softtrace, more exits", 0.35, "peers-107m", "softtrace, more exits"),
    "third": (
        "drafting after 0.31, exits 1", 0.35, "drafting-depths-107m", "one exit, after 5 layers"
    ),
    "quarter": (
        "drafting after 0.25, exits 0.5", 0.35, "drafting-depths-107m", "one exit, after 4 layers"
    ),
}  # fmt: skip


def decoding_107m() -> str:
    """Self-speculation at a larger size, by what the model was fine-tuned with."""
    raced = {
        kind: [read(f"decoding-107m-{kind}-{seed}.json") for seed in range(3)]
        for kind in ("gpu", "cpu")
    }
    lines = [
        "| fine-tuned with | held-out loss | exits agree, easy | exit layers, GPU | CPU "
        "| tokens a check, GPU | CPU | tokens/s over plain decoding, GPU | CPU | seeds |",
        "|---" * 10 + "|",
    ]
    same = []
    for name, (method, strength, file, title) in RACED.items():
        every = {kind: [each[name] for each in of if name in each] for kind, of in raced.items()}
        count = len(every["gpu"])
        runs = read(f"{file}.json")["runs"]
        rows = [
            run for run in runs
            if (run["method"], run["strength"]) == (method, strength) and run["seed"] < count
        ]  # fmt: skip
        direct = {kind: [each["loops"]["direct"] for each in of] for kind, of in every.items()}
        same += [each["identical"] for of in direct.values() for each in of]
        speeds = []
        for of in direct.values():
            medians = [each["speedup"]["median"] for each in of]
            spread = f" ({min(medians):.2f} to {max(medians):.2f})" if medians[1:] else ""
            speeds.append(f"{statistics.mean(medians):.2f}{spread}")
        layers = (", ".join(str(each["exit_layer"]) for each in of) for of in every.values())
        written = (
            sum(each["accepted"] + each["checks"] for each in of) / sum(e["checks"] for e in of)
            for of in direct.values()
        )
        tokens = " | ".join(f"{each:.2f}" for each in written)
        lines.append(
            f"| {title} | {statistics.mean(_ratios(runs, rows, 'loss')) - 1:+.2%} | "
            f"{statistics.mean(row['exit_easy'] for row in rows):.1%} | {' | '.join(layers)} | "
            f"{tokens} | {' | '.join(speeds)} | {count} |"
        )
    first, where = raced["gpu"][0], raced["cpu"][0]["hardware"]
    lines.append(
        f"\nThe models of the table above (107 M parameters, 16 layers); a seed's figure is the "
        f"median of {first['plain']['prompts']} prompts, {first['plain']['new_tokens']} tokens "
        f"written for each, and layer, draft length and confidence were chosen on "
        f"{first['plain']['prompts_chosen_on']} others; means over seeds (smallest to largest); "
        f"`softtrace.decoding.speculate`, float32; {min(same):.0%} of the texts are identical to "
        f"plain decoding's; {first['hardware']} and {where}, six such measurements at a time "
        "([decoding.py](benchmarks/decoding.py), decoding-107m-gpu-\\*.json, "
        "decoding-107m-cpu-\\*.json)."
    )
    return "\n".join(lines)


def decoding_large() -> str:
    """Self-speculation of a larger model, by what it was fine-tuned with."""
    trained = read("drafting-107m.json")
    runs = {run["method"]: run for run in trained["runs"]}
    names = {"8th": "softtrace, default", **{name: name for name in runs if "drafting" in name}}
    lines = [
        "| fine-tuned with | held-out loss | size, easy | exits agree, easy | exit layer, "
        "draft tokens | accepted | tokens/s over plain decoding, GPU | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    files = {
        name: {
            kind: read(f"decoding-107m-{name.replace(' ', '-')}-{kind}.json")
            for kind in ("gpu", "cpu")
        }
        for name in names
    }
    first = next(iter(names))
    rows = [("plain", "plain", first), *((name, "penalty", name) for name in names)]
    for name, arm, source in rows:
        run, plain = runs[name], runs["plain"]
        found = {kind: files[source][kind][arm] for kind in ("gpu", "cpu")}
        gains = {kind: each["loops"]["direct"] for kind, each in found.items()}
        speeds = (
            "{median:.2f} ({q25:.2f} to {q75:.2f})".format(**gains[kind]["speedup"])
            for kind in ("gpu", "cpu")
        )
        lines.append(
            f"| {names.get(name, 'nothing added')} | {run['loss'] / plain['loss'] - 1:+.2%} | "
            f"{run['size_easy']:.3%} | {run['exit_easy']:.1%} | {found['gpu']['exit_layer']}, "
            f"{found['gpu']['draft_tokens']} | {gains['gpu']['acceptance']:.1%} | "
            f"{' | '.join(speeds)} |"
        )
    every = [each[arm] for of in files.values() for each in of.values() for arm in each
             if arm in ("plain", "penalty")]  # fmt: skip
    same = min(loop["identical"] for arm in every for loop in arm["loops"].values())
    settings, gpu = trained["settings"], files[first]["gpu"]
    lines.append(
        f"\n{settings['model']} (16 layers) on {settings['data']}'s source, one seed, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['block_size']} tokens; "
        f"{gpu['plain']['prompts']} prompts, {gpu['plain']['new_tokens']} tokens written for each; "
        f"`softtrace.decoding.speculate`, float32, prompt by prompt in turns, medians and "
        f"quartiles; {same:.0%} of the texts are identical to plain decoding's; {gpu['hardware']} "
        f"and {files[first]['cpu']['hardware']}, six such measurements at a time "
        "([decoding.py](decoding.py), [drafting-107m.json](drafting-107m.json), "
        "decoding-107m-8th-\\*.json, decoding-107m-drafting-\\*.json)."
    )
    return "\n".join(lines)


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
    """What exits are judged by, and what learns from them."""
    return _search("search-judged")


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
        loss, area, size, hard = (
            statistics.mean(row[key] / plain[row["seed"]][key] for row in rows) for key in keys
        )
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
