"""The effect: fine-tune the shipped model with and without the penalty, in paired runs.

    python -m recipes.benchmarks.comparison.effect       # three seeds, plain against default
    python -m recipes.benchmarks.comparison.effect --arm soft='{"masks": "soft"}' --seeds 1

Both arms of a seed start from the same weights and see the same data in the same order; text and
held-out files are those of an installed package that the model has never seen. By default that is
lightning: the penalty's defaults were searched for on matplotlib and networkx (``LOG.md``), so
figures from there would flatter them; one seed on lightning lowered the strength. Writes
``results/effect.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import softtrace
from recipes.benchmarks.places import MODEL, RESULTS
from softtrace.data import pack, read_documents, split_by_file
from softtrace.data.blocks import evenly
from softtrace.evaluation.measure import measure
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.summary import summarise
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What every comparison of paired runs is told."""
    parser.add_argument("--data", help="folder of source (default: installed lightning)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=128, help="held-out blocks for the density")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def text_of_lightning() -> str:
    """The folder of lightning's source, on which no setting was tuned but the strength."""
    import lightning

    return str(Path(lightning.__file__).parent)


def blocks_of(
    data: str, block_size: int, explained: int, density_block_size: int = 64, model: Path = MODEL
) -> tuple[Tensor, Tensor, Tensor]:
    """Training blocks, held-out blocks for the loss, held-out blocks for the density."""
    tokenizer = load_tokenizer(model)
    train, held_out = split_by_file(read_documents(data, (".py",)), 0.1, "effect")
    return (
        pack(train, tokenizer, block_size),
        pack(held_out, tokenizer, block_size),
        evenly(pack(held_out, tokenizer, density_block_size), explained),
    )


def training(
    model: Any, blocks: Tensor, seed: int, args: argparse.Namespace, title: str
) -> Iterator[tuple[int, Tensor]]:
    """Steps and their batches, in an order that the seed decides.

    Whoever loops over it runs the backward pass; the optimiser's step is done here afterwards.
    """
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [
            torch.randperm(len(blocks), generator=order)
            for _ in range(math.ceil(args.steps * args.batch_size / len(blocks)))
        ]
    )
    for step in tqdm(range(args.steps), desc=title):
        warm = min(1.0, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        yield (
            step,
            blocks[rows[step * args.batch_size : (step + 1) * args.batch_size]].to(args.device),
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def fine_tune(blocks: Tensor, options: dict[str, Any] | None, seed: int, args: argparse.Namespace):
    """Train from the shipped weights; return the model and the seconds of a step, median."""
    model = load_model(MODEL).to(args.device).train()
    penalty = softtrace.DensityLoss(model, seed=seed, **options) if options is not None else None
    title = f"seed {seed} {'penalty' if penalty else 'plain'}"
    times = []
    for _, ids in training(model, blocks, seed, args, title):
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        with nullcontext() if penalty is None else penalty.watching():
            loss = model(input_ids=ids, labels=ids).loss
        if penalty is not None:
            loss = loss + penalty(ids).loss
        loss.backward()
    every = penalty.options.on(model.device).every if penalty else 1
    return model.eval(), statistics.median((b - a) / every for a, b in
                                           zip(times, times[every:], strict=False))  # fmt: skip


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, blocks: Tensor, device: str, batch_size: int = 32
) -> float:
    """Mean loss in nats per token over all blocks."""
    losses = [
        float(model(input_ids=ids, labels=ids).loss) * len(ids)
        for ids in (part.to(device) for part in blocks.split(batch_size))
    ]
    return sum(losses) / len(blocks)


@torch.no_grad()
def side_effects(
    model: torch.nn.Module,
    held_out: Tensor,
    rare: Tensor,
    elsewhere: Tensor,
    device: str,
    batch_size: int = 32,
) -> dict[str, float]:
    """What a penalty might hurt unseen.

    Args:
        model: a fine-tuned one.
        held_out: blocks of the text that it was tuned for.
        rare: ``[V]`` bool, the rarest tokens of the training text that make up a tenth of it.
        elsewhere: blocks of other text.
        device: to compute on.
        batch_size: blocks a forward.

    Returns:
        Loss on the held-out text, on its rare targets and on other text (nats a token), and the
        expected calibration error of the most likely token over 15 bins of equal width.
    """
    losses, confidences, rights, rares = [], [], [], []
    for part in held_out.split(batch_size):
        ids = part.to(device)
        logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        targets = ids[:, 1:]
        losses.append(-logs.gather(-1, targets[..., None]).flatten().cpu())
        best = logs.max(-1)
        confidences.append(best.values.exp().flatten().cpu())
        rights.append((best.indices == targets).flatten().cpu())
        rares.append(rare[part[:, 1:]].flatten())
    loss, confidence, right = torch.cat(losses), torch.cat(confidences), torch.cat(rights).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [
        (confidence[bins == b].mean() - right[bins == b].mean()).abs() * (bins == b).float().mean()
        for b in bins.unique()
    ]
    return {
        "loss": float(loss.double().mean()),
        "loss_rare": float(loss[torch.cat(rares)].double().mean()),
        "loss_elsewhere": held_out_loss(model, elsewhere, device, batch_size),
        "calibration_error": float(torch.stack(gaps).sum()),
    }


def rare_tokens(train: Tensor, vocabulary: int) -> Tensor:
    """``[V]`` bool: the rarest tokens, as many as make up a tenth of the text."""
    counts = train.flatten().bincount(minlength=vocabulary)
    order = counts.argsort()
    few = counts[order].cumsum(0) <= counts.sum() / 10
    rare = torch.zeros(vocabulary, dtype=torch.bool)
    rare[order[few]] = True
    return rare


def library_blocks(block_size: int, model: Path = MODEL) -> Tensor:
    """Blocks of the standard library's files that the shipped model has not seen.

    In the tokens of ``model``.
    """
    names = set((MODEL / "held_out_files.txt").read_text(encoding="utf-8").split("\n"))
    others = ("site-packages", "dist-packages", "lib2to3/tests/data", "test/encoded_modules")
    library = read_documents(sysconfig.get_paths()["stdlib"], (".py",), others)
    documents = [document for document in library if document.name in names]
    return pack(documents, load_tokenizer(model), block_size)


def run(
    blocks: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any] | None,
    seed: int,
    args: argparse.Namespace,
    name: str,
) -> dict[str, float]:
    """One fine-tuning and its measures."""
    train, held_out, density = blocks
    model, seconds = fine_tune(train, options, seed, args)
    if args.keep:
        model.save_pretrained(args.keep / f"{name}-{seed}")
    with tqdm(total=len(density), desc="measuring", unit="block") as bar:
        found = summarise(
            measure(
                model,
                density,
                min_context=32,
                batch_size=32,
                extra_blocks=0,
                progress=bar.update,
                attention="recomputed",
            )
        )
    layers = len(found["early_exit"]["layers"])
    rare = rare_tokens(train, model.config.vocab_size)
    return {
        **side_effects(model, held_out, rare, args.elsewhere, args.device),
        "area_easy": found["area"]["easy"],
        "size_easy": found["size_at_tv_0.2"]["easy"],
        "area_all": found["area"]["all"],
        "area_hard": found["area"]["hard"],
        "size_all": found["size_at_tv_0.2"]["all"],
        "size_hard": found["size_at_tv_0.2"]["hard"],
        "exit_easy": found["early_exit"]["agreement"]["easy"][layers // 2 - 1],
        "step_seconds": seconds,
    }


def performed(work: list[tuple[Any, ...]], jobs: int) -> Iterator[dict[str, float]]:
    """What :func:`run` gives, in order; several at once share the processor's threads."""
    if jobs == 1:
        yield from (run(*each) for each in work)
        return
    spawn = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(run, *zip(*work, strict=True))


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, extremes and the values themselves."""
    return {
        "mean": statistics.mean(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_training_arguments(parser)
    parser.add_argument("--arm", action="append", default=[], help="name={JSON options}")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the models, ARM-SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (step times suffer)")
    parser.add_argument("--out", type=Path, default=RESULTS / "effect.json")
    args = parser.parse_args()
    args.data = args.data or text_of_lightning()
    arms: dict[str, dict[str, Any] | None] = {} if args.no_plain else {"plain": None}
    for arm in args.arm or ["penalty={}"]:
        name, _, options = arm.partition("=")
        arms[name] = json.loads(options)
    blocks = blocks_of(args.data, args.block_size, args.blocks)
    args.elsewhere = library_blocks(args.block_size)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    tasks = [(seed, name) for seed in range(args.seeds) for name in arms]
    work = [(blocks, arms[name], seed, args, name) for seed, name in tasks]
    for (seed, name), found in zip(tasks, performed(work, args.jobs), strict=True):
        runs[name].append(found)
        print(name, seed, {key: f"{v:.4g}" for key, v in found.items()}, flush=True)
    result = {
        **provenance(torch.device(args.device)),
        "model": MODEL.name,
        "data": Path(args.data).name,
        "train_blocks": len(blocks[0]),
        "explained_positions": len(blocks[2]) * 31,
        "settings": {
            key: getattr(args, key) for key in ("steps", "batch_size", "block_size", "lr")
        },
        "arms": {
            name: {
                "options": arms[name],
                **{key: spread([r[key] for r in rows]) for key in rows[0]},
            }
            for name, rows in runs.items()
        },
    }
    if "plain" in runs:
        result["ratio_to_plain"] = {
            name: {
                key: spread([a[key] / b[key] for a, b in zip(rows, runs["plain"], strict=True)])
                for key in rows[0]
            }
            for name, rows in runs.items()
            if name != "plain"
        }
        for name, ratios in result["ratio_to_plain"].items():
            print(name, "relative to plain:")
            for key, found in ratios.items():
                print(
                    f"  {key:14s} {found['mean']:.3f}  ({found['min']:.3f} to {found['max']:.3f})"
                )
    write_json(args.out, result)


if __name__ == "__main__":
    main()
