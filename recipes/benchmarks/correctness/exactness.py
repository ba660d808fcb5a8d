"""How exact the penalty is under trainers and interruptions: the figures, not only green or red.

    python -m recipes.benchmarks.correctness.exactness    # all parts, about 20 minutes on 2 cores
    python -m recipes.benchmarks.correctness.exactness --parts kills --kills 30

Uses the cases of ``tests/`` (which is not installed) and measures what those assert. Writes
``results/exactness.json``; parts that are not named keep what the file holds, as do rows of
DeepSpeed where it is not installed (``pip install deepspeed``; ``DS_ACCELERATOR=cpu``).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from recipes.benchmarks.correctness.interruptions import cuts, difference, is_there, kills
from recipes.benchmarks.places import RESULTS
from softtrace import DensityLoss
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.lightning import DensityPenalty
from tests.support import hf_training as hf
from tests.support import (
    lightning_runs,
    ways_to_continue,
    ways_to_resume,
    ways_to_shard,
    ways_to_step,
)
from tests.support.corpus import byte_tokenizer, write_tree
from tests.support.fitting import weights
from tests.support.mutations import MUTATIONS, run_tests
from tests.support.processes import as_rank
from tests.support.tiny import tiny_model
from tests.support.units import WAYS as WAYS_TO_SHARD
from tests.support.ways_to_fit import OPTIONS, WAYS

STEPS = 50
IN_PARTS = {
    "ModelParallelStrategy": "FSDP2", "FSDPStrategy": "FSDP1", "DeepSpeedStrategy": "ZeRO 2",
    "DeepSpeedStrategy(stage=3)": "ZeRO 3",
}  # fmt: skip


def inert(args: argparse.Namespace) -> dict[str, Any]:
    """Every supported combination at strength 0 against no callback: max |Δw|; and at 0.6."""
    found = dict(args.known.get("inert", {})) if args.fits else {}
    for name, way in IN_PARTS.items():
        if name in (args.fits or [name]) and is_there(way):
            found[name] = inert_in_parts(way)
    if args.fits:
        ways = {name: way for name, way in WAYS.items() if name in args.fits}
    else:
        ways = WAYS
        found |= inert_in_processes()
    for name, way in tqdm(ways.items(), desc="strength 0"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, fitted = way.fit(steps=STEPS)
            silent, _ = way.fit(DensityPenalty(0.0, **OPTIONS), steps=STEPS)
            loud, _ = way.fit(DensityPenalty(0.6, **OPTIONS), steps=STEPS)
        found[name] = inert_row(fitted.global_step, *map(weights, (plain, silent, loud)))
    return found


def inert_in_parts(way: str) -> dict[str, Any]:
    """Two processes that share one model."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = -(-STEPS // ways_to_resume.BATCHES)
        runs = [
            ways_to_resume.fit_in_parts(Path(folder), 2, None, strength, epochs, way)
            for strength in (None, 0.0, 0.6)
        ]
    flat = [torch.cat([each.flatten() for each in found.values()]) for found in runs]
    return inert_row(epochs * ways_to_resume.BATCHES, *flat)


def inert_in_processes() -> dict[str, Any]:
    """Two processes of Lightning, and transformers' Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = STEPS // 2  # of two optimiser steps
        plain, silent, loud = (
            lightning_runs.fit_in_processes(Path(folder), strength, 2, epochs)[0]["weights"]
            for strength in (None, 0.0, 0.6)
        )
        found = {"DDPStrategy": inert_row(STEPS, plain, silent, loud)}
        plain, silent, loud = (
            weights(hf.train(Path(folder), density, "gpt2", max_steps=STEPS).model)
            for density in (None, {"strength": 0.0}, hf.OPTIONS)
        )
        found["Trainer of transformers"] = inert_row(STEPS, plain, silent, loud)
    return found


def inert_row(
    steps: int, plain: torch.Tensor, silent: torch.Tensor, loud: torch.Tensor
) -> dict[str, Any]:
    """Weights without the penalty, at strength 0, at 0.6."""
    found = {"strength 0": difference(silent, plain), "strength 0.6": difference(loud, plain)}
    return {"steps": steps, **found}


def resumed(args: argparse.Namespace) -> dict[str, Any]:
    """Straight runs against runs that were resumed at every step: max |Δw|."""
    found = dict(args.known.get("resumed", {}))
    for way in ("FSDP2", "FSDP1", "ZeRO 1", "ZeRO 2", "ZeRO 3"):
        if way in (args.fits or [way]) and is_there(way):
            found[way] = resumed_in_parts(way)
    if not args.fits:
        found |= {"Lightning": resumed_by_lightning(), "Trainer": resumed_by_trainer()}
    return found


def resumed_in_parts(way: str) -> dict[str, Any]:
    """Two processes that share one model, by Lightning."""
    with tempfile.TemporaryDirectory() as folder:
        ways_to_resume.fit_in_parts(Path(folder), 2, way=way)
        runs = [
            ways_to_resume.fit_in_parts(
                Path(folder), 2, Path(folder, "parts.ckpt"), strength, 2, way
            )
            for strength in (0.5, 0.3)
        ]
        Path(folder, "straight").mkdir()
        runs.append(ways_to_resume.fit_in_parts(Path(folder, "straight"), 2, None, 0.5, 2, way))
    same, other, straight = (
        torch.cat([each.flatten() for each in found.values()]) for found in runs
    )
    steps = 2 * ways_to_resume.BATCHES
    largest, control = (difference(found, straight) for found in (same, other))
    return {"steps": steps, "largest": largest, "control": control}


def resumed_by_lightning() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        byte_tokenizer().save_pretrained(Path(folder, "tokenizer"))
        corpus = write_tree(Path(folder, "tree"))
        straight = lightning_runs.fit_corpus(corpus)
        steps = len(list(Path(folder).glob("step=*.ckpt")))
        worst = 0.0
        for step in tqdm(range(1, steps), desc="resumed, Lightning"):
            found = lightning_runs.fit_corpus(corpus, Path(folder, f"step={step}.ckpt"))
            worst = max(worst, difference(found, straight))
        other = lightning_runs.fit_corpus(corpus, Path(folder, "step=4.ckpt"), warmup_steps=7)
    return {"steps": steps - 1, "largest": worst, "control": difference(other, straight)}


def resumed_by_trainer() -> dict[str, Any]:
    options = {**hf.OPTIONS, "warmup_steps": 5, "every": 2}
    with tempfile.TemporaryDirectory() as folder:
        whole = hf.train(Path(folder), options, "gpt2", save_strategy="steps", save_steps=1)
        last = weights(whole.model)
        steps = range(1, whole.state.global_step)
        runs = {step: weights(hf.resumed(Path(folder), step, options).model) for step in steps}
        other = hf.resumed(Path(folder), 1, {**options, "seed": 3, "strength": 0.5})
    return {
        "steps": len(runs),
        "largest": max(difference(found, last) for found in runs.values()),
        "control": difference(weights(other.model), last),
    }


def parallel(args: argparse.Namespace) -> dict[str, Any]:
    """Two processes against one, accumulation, kernels: largest relative differences, float64."""
    rows: dict[str, float] = {}

    def relative(one: torch.Tensor, other: torch.Tensor) -> float:
        return difference(one, other) / float(other.abs().max())

    with tempfile.TemporaryDirectory() as folder:
        ways_to_step.run_ranks(folder)
        ranks = [torch.load(Path(folder, f"{r}.pt"), weights_only=True) for r in range(2)]
    worst = 0.0
    for index, options in enumerate(ways_to_step.IN_PARALLEL):
        model = tiny_model("llama", seed=1, dtype=torch.float64)
        penalty, serial = DensityLoss(model, **options), []
        for rank, (ids, mask) in enumerate(ways_to_step.micro_batches(2)):
            with as_rank(rank):
                task, term = ways_to_step.both(model, penalty, ids, mask)
            serial.append(ways_to_step.gradient_of(model, task + term))
        worst = max(worst, relative(ranks[0][index], (serial[0] + serial[1]) / 2))
    rows["two processes, gradients"] = worst
    rows["between the two processes"] = difference(ranks[0], ranks[1])
    for parts in (2, 4):
        (terms, gradients), (term, gradient) = ways_to_step.accumulated_and_whole(parts)
        rows[f"{parts} accumulated batches against one, term"] = relative(terms, term)
        rows[f"{parts} accumulated batches against one, gradients"] = relative(gradients, gradient)
    for options in ways_to_step.IN_PARALLEL:
        (term, gradient), (again, recomputed) = ways_to_step.with_and_without_checkpointing(options)
        for name, pair in (("term", (again, term)), ("gradients", (recomputed, gradient))):
            key = f"checkpointing on against off, {name}"
            rows[key] = max(rows.get(key, 0.0), relative(*pair))
    kernels = []
    for kernel in ("sdpa", "eager"):
        model = tiny_model("llama", seed=2)  # transformers' eager softmax is float32's at most
        model.set_attn_implementation(kernel)
        task, term = ways_to_step.both(
            model,
            DensityLoss(model, **ways_to_step.IN_PARALLEL[2]),
            *ways_to_step.micro_batches(1)[0],
        )
        kernels.append((term.detach(), ways_to_step.gradient_of(model, task + term)))
    rows["sdpa against eager, term (float32)"] = relative(kernels[0][0], kernels[1][0])
    rows["sdpa against eager, gradients (float32)"] = relative(kernels[0][1], kernels[1][1])
    with tempfile.TemporaryDirectory() as folder:
        options = {**hf.OPTIONS, "exits": 0.4}
        for accumulate in (1, 2, 3):
            model = tiny_model("llama", dtype=torch.float64).train()
            settings = hf.arguments(Path(folder), gradient_accumulation_steps=accumulate)
            kind: Any = hf.DensityTrainer
            kind(model=model, args=settings, train_dataset=hf.rows(), density=options).train()
            wanted = hf.by_hand(accumulate, True, options)
            rows[f"Trainer, {accumulate} accumulated, against a loop by hand"] = relative(
                weights(model), weights(wanted)
            )
    return rows


def sharded(args: argparse.Namespace) -> dict[str, Any]:
    """Engines against one process with all batches: largest relative differences."""
    flat = tuple(name for name in WAYS_TO_SHARD if name.startswith("flat"))
    others = tuple(name for name in WAYS_TO_SHARD if name not in flat)
    rows: dict[str, float] = dict(args.known.get("sharded", {}))
    for engine, ranks, ways in (
        ("FSDP2", 2, others), ("FSDP2", 3, ("norm and head",)), ("FSDP1", 2, flat),
        ("FSDP1", 3, ("flat",)), ("ZeRO 1", 2, ("ZeRO 1",)), ("ZeRO 2", 2, ("ZeRO 2",)),
        ("ZeRO 1", 3, ("ZeRO 1",)), ("ZeRO 2", 3, ("ZeRO 2",)),
        ("ZeRO 3", 2, ("ZeRO 3",)), ("ZeRO 3", 3, ("ZeRO 3",)),
    ):  # fmt: skip
        if engine not in (args.fits or [engine]) or not is_there(engine):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = ways_to_shard.of_ranks(Path(folder), ranks, *ways)
        zero = engine.startswith("ZeRO")
        runs = [(ways[0], "default", ways_to_shard.STEPS)] if zero else ways_to_shard.runs(ways)
        dtype = torch.float32 if zero else torch.float64
        for what, gap in in_parts(found, runs, dtype).items():
            said = " (float32)" if zero else ""
            rows[f"{engine}, {ranks} processes, {ways_to_shard.STEPS} steps, {what}{said}"] = gap
    if "FSDP2" in (args.fits or ["FSDP2"]):
        rows |= continued()
    return dict(sorted(rows.items()))


def continued() -> dict[str, float]:
    """Checkpoints in parts that other numbers of processes continue from, against no break."""
    options, steps = ways_to_shard.OPTIONS["default"], ways_to_continue.LEGS[-1][1]
    with tempfile.TemporaryDirectory() as folder:
        for first, last, ranks in ways_to_continue.LEGS:
            after = ways_to_continue.continued(Path(folder), ranks, first, last)
    wanted = ways_to_shard.trained(None, options, steps, 0, ways_to_continue.BATCHES)[1]
    gaps = [difference(after[key], each) / float(each.abs().max()) for key, each in wanted.items()]
    numbers = ", then ".join(str(ranks) for _, _, ranks in ways_to_continue.LEGS)
    return {f"FSDP2 on {numbers} processes, {steps} steps, weights": max(gaps)}


def in_parts(
    found: list[dict[str, Any]], runs: list[tuple[str, str, int]], dtype: torch.dtype
) -> dict[str, float]:
    """Largest relative differences of losses, gradients and weights from those of one process."""
    worst, ranks = {"losses": 0.0, "gradients": 0.0, "weights": 0.0}, len(found)
    for way, name, steps in runs:
        options = ways_to_shard.OPTIONS[name]
        losses, wanted, back = ways_to_shard.trained(None, options, steps, 0, ranks, dtype)
        for rank, each in enumerate(found):
            own, after, gradients = each[f"{way}, {name}"]
            pairs = {
                "losses": zip(own, losses[rank::ranks], strict=True),
                "gradients": (
                    (one[key], other[key])
                    for one, other in zip(gradients, back, strict=True)
                    for key in other
                ),
                "weights": ((after[key], wanted[key]) for key in wanted),
            }
            for what, both in pairs.items():
                gap = max(difference(a, b) / max(float(b.abs().max()), 1e-30) for a, b in both)
                worst[what] = max(worst[what], gap)
    return worst


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of all tensors that are alive after so many steps of a plain loop."""
    model = tiny_model("gpt2").train()
    density = DensityLoss(model, share=0.5, exits=0.3, every=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    alive = {}
    for step in range(200):
        ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(step))
        with density.watching():
            loss = model(input_ids=ids, labels=ids).loss
        (loss + density(ids).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (20, 200):
            del loss
            gc.collect()
            held = {
                each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in gc.get_objects()
                if isinstance(each, torch.Tensor) and each.layout == torch.strided
            }
            alive[f"after {step + 1} steps"] = sum(held.values())
    return {"bytes": alive}


def mutations(args: argparse.Namespace) -> dict[str, Any]:
    """Every guard taken out: does its test turn red? Its test is green with all guards in place."""
    chosen = [each for each in MUTATIONS if each.name in (args.guards or [each.name])]
    for test in tqdm(sorted({each.test for each in chosen}), desc="guards in place"):
        code, said = run_tests(None, test)
        if code:
            raise SystemExit(f"{test} fails with all guards in place:\n{said[-3000:]}")
    found = dict(args.known.get("mutations", {})) if args.guards else {}
    for each in tqdm(chosen, desc="mutations"):
        code, said = run_tests(each, each.test)
        if code not in (0, 1):  # 1: tests failed; all else is no answer
            raise SystemExit(f"{each.name}: pytest ended with {code}\n{said[-3000:]}")
        found[each.name] = {"test": each.test, "red": code == 1}
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "inert": inert,
    "resumed": resumed,
    "kills": kills,
    "cuts": cuts,
    "parallel": parallel,
    "sharded": sharded,
    "memory": memory,
    "mutations": mutations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--fits", nargs="+", help="ways to fit and engines to run anew (all)")
    parser.add_argument("--guards", nargs="+", help="mutations to run anew, by name (all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "exactness.json")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
    args.known = result
    for name in args.parts:
        result[name] = PARTS[name](args)
        print(name, json.dumps(result[name], indent=1), flush=True)
        write_json(args.out, {**result, **provenance(torch.device("cpu"))})


if __name__ == "__main__":
    main()
