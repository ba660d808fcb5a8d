"""Every peer loss against this project's, at equal held-out loss.

    P=recipes.benchmarks.comparison.peers
    python -m $P                       # all methods and strengths, 3 seeds
    python -m $P --methods layerskip softtrace --seeds 1
    python -m $P --cost                # step time and peak memory alone: see step_cost.py
    python -m $P --cost --methods softtrace --rounds 12    # of one method
    python -m $P --search              # variants of this project's own term
    python -m $P --jobs 6 --devices cuda:0 cuda:1    # several at once

At a larger size, with a model that ``pretrain.py`` trained:

    python -m $P --model MODEL --data TEXT --bf16 --lr 3e-4 --batch-size 32 --block-size 256 \\
        --keep runs/peers --out runs/peers.json

All runs of a seed start from the same weights and see the same data in the same order, held-out
files as in ``effect.py``. Each method is swept over its strength; a measure is then read where its
curve over held-out loss meets +1 % of plain fine-tuning. Results are added to
``results/peers.json`` run by run, so that what was interrupted resumes; ``peers.png`` beside it
shows the fronts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks.comparison.effect import (
    add_training_arguments,
    blocks_of,
    text_of_lightning,
)
from recipes.benchmarks.comparison.exit_variants import EVERY, VARIANTS
from recipes.benchmarks.comparison.paired_runs import DRAFT, NEW, Task, perform_all, settings_of
from recipes.benchmarks.comparison.peer_losses import METHODS
from recipes.benchmarks.comparison.step_cost import record_cost
from recipes.benchmarks.places import MODEL, RESULTS
from softtrace.evaluation.provenance import provenance
from softtrace.files import atomic_path, write_json

BUDGET = 1.01
#: measure, whether lower is better, and what a plot calls it
MEASURES: dict[str, tuple[bool, str]] = {
    "area_easy": (True, "area, easy tokens"),
    "size_easy": (True, "median size at TV 0.2, easy"),
    "exit_easy": (False, "exits at half depth that agree, easy"),
    "size_hard": (True, "median size at TV 0.2, hard"),
    "exit_all": (False, "exits at half depth that agree, all"),
    "accepted": (False, "accepted tokens a draft of 4, half depth"),
    "accepted_quarter": (False, "accepted tokens a draft of 4, quarter depth"),
}
#: lists, one value for each exit, and what a plot calls them
EXITS = {"exits_easy": "exits that agree, easy", "exits_all": "exits that agree, all"}


def paired(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of seeds whose plain run is there: several at once end in any order."""
    seeds = {run["seed"] for run in runs if run["method"] == "plain"}
    return [run for run in runs if run["seed"] in seeds]


def front(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A method's points, plain fine-tuning first: means over seeds of paired ratios and values.

    Those of ``EXITS`` are lists, one value for each exit.

    Of plain fine-tuning those seeds count that the method has.
    """
    seeds = {run["seed"] for run in runs if run["method"] == name}
    plain = {r["seed"]: r for r in runs if r["method"] == "plain" and r["seed"] in seeds}
    points = [{"strength": 0.0, "loss": 1.0, "seeds": float(len(plain)), **_means(plain.values())}]
    for strength in sorted({run["strength"] for run in runs if run["method"] == name}):
        rows = [r for r in runs if (r["method"], r["strength"]) == (name, strength)]
        ratio = statistics.mean(row["loss"] / plain[row["seed"]]["loss"] for row in rows)
        point = {"strength": strength, "loss": ratio, "seeds": float(len(rows)), **_means(rows)}
        points.append(point)
    return points


def _means(rows: Any) -> dict[str, Any]:
    rows = list(rows)
    return {
        **{key: statistics.mean(row[key] for row in rows) for key in MEASURES},
        **{
            key: [statistics.mean(of) for of in zip(*(row[key] for row in rows), strict=True)]
            for key in EXITS
        },
    }


def at_budget(points: list[dict[str, Any]], key: str, budget: float = BUDGET) -> float:
    """A measure where held-out loss is ``budget`` times plain fine-tuning's, at most.

    The best that a method has within the budget: its own points, and where a line between two
    points of neighbouring strength crosses the budget. A
    method whose strongest point is within the budget was swept too weakly: see "largest_loss".
    """
    losses = [point["loss"] for point in points]
    return _best(losses, [point[key] for point in points], budget, lower=MEASURES[key][0])


def exits_at_budget(points: list[dict[str, Any]], key: str, budget: float = BUDGET) -> list[float]:
    """The same of every exit: agreement after 1, 2, ... layers, each the best within the budget."""
    losses = [point["loss"] for point in points]
    by_exit = zip(*(point[key] for point in points), strict=True)
    return [_best(losses, values, budget, lower=False) for values in by_exit]


def _best(losses: Sequence[float], values: Sequence[float], budget: float, lower: bool) -> float:
    points = list(zip(losses, values, strict=True))
    inside = [value for loss, value in points if loss <= budget]
    for a, b in itertools.pairwise(points):  # neighbours in strength
        if (a[0] <= budget) != (b[0] <= budget):
            inside.append(a[1] + (budget - a[0]) / (b[0] - a[0]) * (b[1] - a[1]))
    return min(inside) if lower else max(inside)


def plot(runs: list[dict[str, Any]], out: Path) -> None:
    """One page: every measure against held-out loss, and exits by layer at +1 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen = {run["method"] for run in runs} - {"plain"}
    names = [name for name in EVERY if name in seen]
    figure, axes = plt.subplots(3, 3, figsize=(11, 10), layout="constrained")
    panels, by_exit = axes.flat[:7], axes.flat[7:]
    styles = {
        name: {
            "marker": "osv^Dx"[index % 6],
            "color": "black" if name == "softtrace" else f"C{index}",
            "linewidth": 2.2 if name == "softtrace" else 1.2,
            "label": name,
        }
        for index, name in enumerate(names)
    }
    fronts = {name: front(runs, name) for name in names}
    for axis, (key, (lower, title)) in zip(panels, MEASURES.items(), strict=True):
        for name, points in fronts.items():
            loss = [100 * (point["loss"] - 1) for point in points]
            axis.plot(loss, [point[key] for point in points], **styles[name])
        axis.axvline(100 * (BUDGET - 1), color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(f"{title}\n({'lower' if lower else 'higher'} is better)", fontsize=11)
        axis.set_xlabel("held-out loss over plain, %", fontsize=11)
        axis.set_xlim(-0.5, 4)
        if key.startswith("size"):
            axis.set_yscale("log")
    for axis, (key, title) in zip(by_exit, EXITS.items(), strict=True):
        plain = front(runs, "plain")[0][key]
        layers = range(1, len(plain) + 1)
        axis.plot(layers, plain, color="grey", linestyle="--", linewidth=1.2, label="plain")
        for name, points in fronts.items():
            axis.plot(layers, exits_at_budget(points, key), **{**styles[name], "markersize": 4})
        axis.set_title(f"{title}, at +1 %\n(higher is better)", fontsize=11)
        axis.set_xlabel("read after so many layers", fontsize=11)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    said = by_exit[0].get_legend_handles_labels()
    figure.legend(*said, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    with atomic_path(out.with_suffix(".png")) as path:
        figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """Each method's measures at the budget, and its cost."""
    lines = [f"{'at +1 % held-out loss':24s}" + "".join(f"{key:>12s}" for key in MEASURES)]
    for name, row in result["at_budget"].items():
        cells = "".join(f"{row[key]:12.4g}" for key in MEASURES)
        short = "" if row["largest_loss"] > BUDGET or name == "plain" else "  (budget not reached)"
        lines.append(f"{name:24s}{cells}{short}")
    return "\n".join(lines)


def parse() -> tuple[argparse.Namespace, dict[str, list[float]]]:
    """The command line, and the methods that it asks for, each with its strengths, if it says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_training_arguments(parser)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--search", action="store_true", help="what was tried, not the peers")
    parser.add_argument(
        "--methods", nargs="+", help="NAME or NAME=STRENGTH,... (default: all, with their own ones)"
    )
    parser.add_argument("--density-block-size", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="train under autocast")
    parser.add_argument("--rounds", type=int, default=8, help="of timing")
    parser.add_argument("--cost", action="store_true", help="time and memory alone")
    parser.add_argument(
        "--neighbours",
        choices=["yes", "no"],
        help="say with --cost whether other work runs beside it; left out, it is not noted",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the models, METHOD-STRENGTH-SEED; what it holds is not trained anew",
    )
    parser.add_argument(
        "--trained", type=Path, help="models of effect.py --keep, for its rows at the defaults"
    )
    parser.add_argument(
        "--by-method", action="store_true", help="all seeds of a method, then the next one's"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--devices", nargs="+", help="that they are spread over")
    parser.add_argument("--out", type=Path, help="results (default: recipes/benchmarks/results/)")
    args = parser.parse_args()
    args.devices = args.devices or [args.device]
    args.device = args.devices[0]
    args.data = args.data or text_of_lightning()
    strengths: dict[str, list[float]] = {"plain": []}
    for given in args.methods or (VARIANTS if args.search else METHODS):
        name, _, some = given.partition("=")
        strengths.setdefault(name, []).extend(map(float, some.split(",") if some else ()))
    if unknown := set(strengths) - set(EVERY):
        parser.error(f"--methods: found {sorted(unknown)}, allowed are {sorted(EVERY)}")
    stem = "log/search" if args.search else "cost" if args.cost else "peers"
    args.out = args.out or RESULTS / f"{stem}.json"
    return args, strengths


def main() -> None:
    began = time.monotonic()
    args, strengths = parse()
    if args.cost:
        train, *_ = blocks_of(
            args.data, args.block_size, args.blocks, args.density_block_size, args.model
        )
        record_cost(args, train, list(strengths))
        return
    settings = {
        **settings_of(args),
        **{name: getattr(args, name) for name in ("density_block_size", "blocks")},
        "draft_tokens": DRAFT,
        "written_tokens": NEW,
    }
    result: dict[str, Any] = {"runs": []}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            sys.exit(f"{args.out} holds runs of other settings: {result['settings']}; move it away")
    result |= {
        "settings": settings,
        "explained_positions": args.blocks * (args.density_block_size // 2 - 1),
    }

    def save() -> None:
        runs = paired(result["runs"])
        done = [name for name in EVERY if any(run["method"] == name for run in runs)]
        if done:
            fronts = {name: front(runs, name) for name in done}
            result["at_budget"] = {
                name: {
                    **{key: at_budget(points, key) for key in MEASURES},
                    "largest_loss": max(point["loss"] for point in points),
                }
                for name, points in fronts.items()
            }
            if not args.search:
                plot(runs, args.out)
        write_json(args.out, {**result, **provenance(torch.device(args.device))})

    known = {(run["method"], run["strength"], run["seed"]) for run in result["runs"]}
    tasks = [
        Task(name, strength, seed)
        for seed in range(args.seeds)
        for name, some in strengths.items()
        for strength in dict.fromkeys(some or EVERY[name].strengths or (0.0,))
        if (name, strength, seed) not in known
    ]
    if args.by_method:
        order = list(strengths)
        tasks.sort(key=lambda task: order.index(task.method))
    for row in perform_all(tasks, result["runs"], args, began + 60 * args.minutes):
        result["runs"].append(row)
        save()
        shown = {key: f"{row[key]:.4g}" for key in ("loss", *MEASURES)}
        print(row["method"], row["strength"], row["seed"], shown, flush=True)
        known.add((row["method"], row["strength"], row["seed"]))
    if any((task.method, task.strength, task.seed) not in known for task in tasks):
        sys.exit(f"{args.minutes:g} minutes are over; the same command resumes")
    save()
    print(table(result))


if __name__ == "__main__":
    main()
