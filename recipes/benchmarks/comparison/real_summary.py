"""What all runs on real models come to: means over seeds, paired with plain fine-tuning's."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from recipes.benchmarks.comparison import equal_loss
from recipes.benchmarks.comparison.equal_loss import spread
from recipes.benchmarks.comparison.real_tasks import TASKS
from recipes.benchmarks.places import RESULTS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

#: what runs of one row of the table have in common, beside the way to train
KINDS = ("model", "text", "lora", "steps", "blocks")


def summarise_runs(folder: Path) -> None:
    """Write every run, their table and what :func:`equal_loss.at_budget` reads of them; plot it.

    Runs that the result holds already stay beside those that lie in the folder.
    """
    result = RESULTS / "on_real_models.json"
    runs: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))["runs"]
    for path in sorted(folder.glob("*.json")):
        if (run := json.loads(path.read_text(encoding="utf-8"))) not in runs:
            runs.append(run)
    table = table_of(runs)
    read = {"table": table, "at_budget": equal_loss.at_budget(runs, KINDS)}
    write_json(result, {**read, "runs": runs, **provenance(torch.device("cpu"))})
    from recipes.benchmarks.comparison.real_model_plots import plot  # matplotlib

    plot(table, RESULTS / "on_real_models.png")
    for row in table:
        at = {name.split()[0]: row[name] for name in row if name.endswith(" recomputed")}
        print(
            f"{row['model']} {row['text']} {row['method']} {row['strength']:g}: "
            f"loss {100 * (row['loss']['mean'] - 1):+.2f} %, "
            + ", ".join(
                f"{n}: area {v['area_easy']['mean']:.3f} size {100 * v['size_easy']['mean']:.3g} % "
                f"rho {v['spearman']['mean']:+.2f} exits {100 * v['exit_easy']['mean']:.0f} %"
                for n, v in at.items()
            )
        )


def table_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every way to train: means over seeds, over the paired plain runs' where it says so.

    Losses are also over the lowest held-out loss that the plain run had at any time, if it was
    measured: where text is read again and again, plain fine-tuning learns it by heart. Pairs saw
    the same blocks: a run without a plain one on its blocks is left out.
    """
    paired = (*KINDS, "seed")
    plain_runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if run["method"] == "plain":
            plain_runs.setdefault(tuple(run.get(k) for k in paired), []).append(run)
    plain = {key: mean_of(found) for key, found in plain_runs.items()}
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if tuple(run.get(k) for k in paired) in plain:
            of = (*(run.get(k) for k in KINDS), run["method"], run["strength"])
            rows.setdefault(of, []).append(run)
    return [
        {
            **dict(zip((*KINDS, "method", "strength"), key, strict=True)),
            "copied": found[0].get("copied"),
            "seeds": len({run["seed"] for run in found}),
            "runs": len(found),
            "loss": spread([
                run["loss"] / before["loss"] for run, before in zip(found, pairs, strict=True)
            ]),
            **({
                "loss over lowest": spread([
                    run["loss"] / before["lowest"] for run, before in zip(found, pairs, strict=True)
                ]),
            } if all("lowest" in before for before in pairs) else {}),
            **{
                place: {name: spread([run[place][name] for run in found])
                        for name in found[0][place]}
                for place in found[0]
                if place.endswith(("recomputed", "recorded"))
                and all(place in run for run in found)
            },
            "side_effects": {
                name: spread([
                    run["side_effects"][name] / before["side_effects"][name]
                    for run, before in zip(found, pairs, strict=True)
                ])
                for name in found[0].get("side_effects", {})
            },
            "hard_over_plain": {
                place: {
                    name: spread([
                        run[place][name] / before[place][name]
                        for run, before in zip(found, pairs, strict=True)
                    ])
                    for name in ("area_hard", "size_hard")
                }
                for place in found[0]
                if place.endswith("recomputed")
                and all(place in each for each in (*found, *pairs))
            },
            "tasks": {
                name: {
                    "right": spread([run["tasks"][name] for run, _ in had]),
                    "over plain": spread([
                        run["tasks"][name] - before["tasks"][name] for run, before in had
                    ]),
                }
                for name in TASKS
                if (had := [
                    (run, before) for run, before in zip(found, pairs, strict=True)
                    if name in run.get("tasks", {}) and name in before["tasks"]
                ])
            },
        }
        for key, found in rows.items()
        for pairs in [[plain[tuple(run.get(k) for k in paired)] for run in found]]
    ]  # fmt: skip


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses, side effects, tasks and measures of runs that repeat each other."""
    found: dict[str, Any] = {"loss": statistics.mean(run["loss"] for run in runs)}
    if all("held_out_losses" in run for run in runs):
        lowest = (min(run["loss"], *run["held_out_losses"].values()) for run in runs)
        found["lowest"] = statistics.mean(lowest)
    places = (name for name in runs[0] if name.endswith(("recomputed", "recorded")))
    for group in ("side_effects", "tasks", *places):
        each = [run[group] for run in runs if group in run]
        names = dict.fromkeys(name for values in each for name in values)  # a task may be newer
        found[group] = {
            name: statistics.mean(values[name] for values in each if name in values)
            for name in names
        }
    return found
