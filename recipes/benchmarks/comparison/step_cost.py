"""What a training step costs with each loss: time and peak memory, over a plain one.

``peers.py --cost`` measures it and writes ``results/cost.json``: all measurements, each with its
machine, whether other work ran beside it (``--neighbours``), its date, versions and rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.benchmarks.comparison.exit_variants import EVERY
from softtrace.evaluation.decode_race import quartiles
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.loading import load_model

PERIOD = 8  # steps timed together, or as many as one with masked runs comes in
#: what two measurements have in common where the later one replaces the earlier
CONDITIONS = (
    *("model", "hardware", "neighbours", "data", "batch_size", "block_size", "precision"),
)


def record_cost(args: argparse.Namespace, blocks: Tensor, names: list[str]) -> None:
    """Measure, and put what was found among the measurements of the file."""
    found = costs(args, blocks, names)
    print(json.dumps(found, indent=1))
    known = []
    if args.out.exists():
        known = json.loads(args.out.read_text(encoding="utf-8"))["measurements"]
    new = {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "batch_size": args.batch_size,
        "block_size": args.block_size,
        "tokens_a_step": args.batch_size * args.block_size,
        "precision": "bfloat16 autocast" if args.bf16 else "float32",
        "neighbours": {"yes": True, "no": False, None: None}[args.neighbours],
        **provenance(torch.device(args.device)),
        "cost": found,
    }
    write_json(args.out, {"measurements": with_measurement(known, new)})


def with_measurement(known: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """All measurements, the new one in place of those of the same losses and conditions.

    What was measured of other losses, or under other conditions, stays.
    """
    anew = set(new["cost"]) - {"plain"}
    kept = []
    for old in known:
        cost = old["cost"]
        if all(old[name] == new[name] for name in CONDITIONS):
            cost = {name: row for name, row in cost.items() if name not in anew}
        if set(cost) - {"plain"}:
            kept.append({**old, "cost": cost})
    return [*kept, new]


def costs(args: argparse.Namespace, blocks: Tensor, names: list[str]) -> dict[str, Any]:
    """Step time and peak memory of every method, interleaved, as ratios to a plain step.

    Time is the mean of a period of steps, memory the larger peak of a step with masked runs and
    one without.
    """
    steps, periods = {}, {}
    for name in names:
        kind = EVERY[name]
        model = load_model(args.model).to(args.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
        strength = kind.strengths[len(kind.strengths) // 2] if kind.strengths else 0.0
        method = kind(model, strength, 0, [10.0] * 10_000)
        periods[name] = method.every * math.ceil(PERIOD / method.every)

        def step(number: int, model=model, optimizer=optimizer, method=method) -> None:
            first = number * args.batch_size % (len(blocks) - args.batch_size)
            ids = blocks[first : first + args.batch_size].to(args.device)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.bf16):
                loss, _ = method(ids, number)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ids.is_cuda:
                torch.cuda.synchronize()

        steps[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(args.rounds + 1), desc="timing"):
        for name, step in steps.items():
            period = periods[name]
            step(1)  # in training a step follows one of the same model, not six others
            began = time.perf_counter()
            for number in range(period * turn, period * (turn + 1)):
                step(number)
            seconds[name].append((time.perf_counter() - began) / period)
    memory = {
        name: max(peak_memory(lambda n=n, step=step: step(n), args.device) for n in (0, 1))
        for name, step in steps.items()
    }
    found = {}
    for name, spent in seconds.items():
        ratios = [a / b for a, b in zip(spent[1:], seconds["plain"][1:], strict=True)]
        found[name] = {
            "time": quartiles(ratios),
            "rounds": args.rounds,
            "memory": memory[name] / memory["plain"],
            "seconds": statistics.median(spent[1:]),
        }
    return found


def peak_memory(step: Any, device: str) -> int:
    """Bytes allocated at most during a step beyond what was there before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # torch 2.11 warns of what it leaves out without acc_events
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
