"""Many paired fine-tunings, several at once: train one method, measure what came out.

What ``peers.py`` compares. Every run of a seed starts from the same weights and sees the same data
in the same order. A method that needs it gets the training losses of the seed's plain run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.benchmarks.comparison.effect import (
    blocks_of,
    library_blocks,
    rare_tokens,
    side_effects,
    training,
)
from recipes.benchmarks.comparison.exit_variants import EVERY
from recipes.benchmarks.comparison.peer_losses import smoothed
from softtrace import DensityOptions
from softtrace.data.blocks import evenly
from softtrace.decoding import check_cache, check_early_exit, speculate
from softtrace.evaluation.measure import measure
from softtrace.evaluation.provenance import hardware
from softtrace.evaluation.summary import summarise
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer

KEPT = "kept.json"  # in the folder of a model: what it was trained with, its training losses
#: what decides how a model is trained; its data and its start go by their names
SETTINGS = ("steps", "batch_size", "block_size", "lr", "bf16")
DRAFT, PROMPTS, NEW = 5, 16, 61  # the first token and twelve full drafts, if all are right


@dataclass(frozen=True)
class Task:
    """One fine-tuning: a method of the peers' or of what was tried, and its dial."""

    method: str
    strength: float
    seed: int
    plain: tuple[float, ...] | None = None


def train(task: Task, blocks: Tensor, args: argparse.Namespace) -> tuple[Any, list[float]]:
    """One fine-tuning; the model and its smoothed task losses."""
    model = load_model(args.model).to(args.device).train()
    method = EVERY[task.method](model, task.strength, task.seed, task.plain and list(task.plain))
    curve: list[float] = []
    title = f"{task.method} {task.strength:g}, seed {task.seed}"
    for step, ids in training(model, blocks, task.seed, args, title):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=args.bf16):
            loss, found = method(ids, step)
        loss.backward()
        curve.append(smoothed(curve[-1], found.item()) if curve else found.item())
    model.set_attn_implementation("sdpa")
    return model.eval(), curve


@dataclass(frozen=True)
class Texts:
    """What runs are trained on and measured by.

    Attributes:
        train, held_out, density: blocks of tokens ``[N, T]``, see ``effect.blocks_of``.
        rare: ``[V]`` bool, see ``effect.rare_tokens``.
        elsewhere: blocks of other text, the standard library's.
    """

    train: Tensor
    held_out: Tensor
    density: Tensor
    rare: Tensor
    elsewhere: Tensor


def measures(model: Any, texts: Texts, device: str) -> dict[str, Any]:
    """What one trained model is compared by."""
    density = texts.density
    with tqdm(total=len(density), desc="measuring", unit="block") as bar:
        found = summarise(
            measure(
                model,
                density,
                min_context=density.shape[1] // 2,
                batch_size=16,
                extra_blocks=0,
                progress=bar.update,
                attention="recorded",
            )
        )
    agreement = found["early_exit"]["agreement"]
    proven_exit = check_early_exit(model)
    layers = proven_exit.layers
    depths = {"accepted": layers // 2, "accepted_quarter": max(1, layers // 4)}
    proven_exit = check_cache(proven_exit, depths.values())
    drafted = {
        name: [
            speculate(
                model, row[None, : row.shape[0] // 2].to(device), exit_layer=depth,
                max_new_tokens=NEW, draft_tokens=DRAFT, confidence=0.0, eos_token_id=-1,
                proven_exit=proven_exit,
            )
            for row in evenly(density, PROMPTS)
        ]
        for name, depth in depths.items()
    }  # fmt: skip
    return {
        **side_effects(model, texts.held_out, texts.rare, texts.elsewhere, device),
        **{
            f"{name}_{group}": found[key][group]
            for name, key in (("area", "area"), ("size", "size_at_tv_0.2"))
            for group in ("easy", "hard", "all")
        },
        "exit_easy": agreement["easy"][layers // 2 - 1],
        "exit_all": agreement["all"][layers // 2 - 1],
        "exits_easy": agreement["easy"],
        "exits_all": agreement["all"],
        **{
            name: sum(t.accepted for t in of) / sum(t.checks for t in of)
            for name, of in drafted.items()
        },
    }


_TEXTS: dict[str, Texts] = {}  # of a worker, tokenised once
ELSEWHERE = 512  # blocks


def texts_for(args: argparse.Namespace) -> Texts:
    """All texts, read once a process."""
    if args.data not in _TEXTS:
        blocks = blocks_of(
            args.data, args.block_size, args.blocks, args.density_block_size, args.model
        )
        rare = rare_tokens(blocks[0], len(load_tokenizer(args.model)))
        elsewhere = evenly(library_blocks(args.block_size, args.model), ELSEWHERE)
        _TEXTS[args.data] = Texts(*blocks, rare, elsewhere)
    return _TEXTS[args.data]


def folder_of(keep: Path, method: str, strength: float, seed: int) -> Path:
    """Where the model of a run is kept."""
    return keep / f"{method.replace(' ', '-')}-{strength:g}-{seed}"


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run was trained with."""
    return {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        **{name: getattr(args, name) for name in SETTINGS},
    }


def kept_losses(folder: Path, args: argparse.Namespace) -> list[float] | None:
    """Training losses of a model that was kept; None where there is none.

    Raises:
        ValueError: it was trained with other settings.
    """
    if not (folder / KEPT).exists():
        return None
    kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    if kept["settings"] != settings_of(args):
        raise ValueError(
            f"{folder} is of other settings: found {kept['settings']}, allowed "
            f"{settings_of(args)}; move it away or give another --keep"
        )
    losses: list[float] = kept["losses"]
    return losses


def perform(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Train, perhaps keep the model, measure: the row of a results file."""
    if args.jobs > 1:  # spread over the GPUs, as the worker's number says; threads likewise
        (number,) = multiprocessing.current_process()._identity  # type: ignore[attr-defined]
        device = args.devices[(number - 1) % len(args.devices)]
        args = argparse.Namespace(**{**vars(args), "device": device})
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    texts = texts_for(args)
    folder = args.keep and folder_of(args.keep, task.method, task.strength, task.seed)
    done = args.trained and args.trained / f"penalty-{task.seed}"
    if done and (task.method, task.strength) == ("softtrace", DensityOptions().strength):
        model, curve = load_model(done).to(args.device).eval(), []
    elif folder and (kept := kept_losses(folder, args)) is not None:
        model, curve = load_model(folder).to(args.device).eval(), kept
    else:
        model, curve = train(task, texts.train, args)
        if folder:
            model.save_pretrained(folder)
            load_tokenizer(args.model).save_pretrained(folder)
            # Last: a folder that has it is whole.
            write_json(folder / KEPT, {"settings": settings_of(args), "losses": curve})
    row = {"method": task.method, "strength": task.strength, "seed": task.seed}
    row |= measures(model, texts, args.device)
    row["hardware"] = hardware(torch.device(args.device))
    if task.method == "plain":
        row["curve"] = curve
    return row


def _end_with_parent() -> None:
    """A worker of a parent that was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def perform_all(
    tasks: list[Task], known: list[dict[str, Any]], args: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Any]]:
    """Rows as they come, ``args.jobs`` at a time; none starts after the deadline.

    Plain runs go first, since some methods wait for their losses. ``known`` holds rows of earlier
    calls.
    """
    curves = {row["seed"]: tuple(row["curve"]) for row in known if row["method"] == "plain"}
    waiting = sorted(tasks, key=lambda task: task.method != "plain")

    def started(run: Callable[[Task], Any]) -> Any:
        """What ``run`` gives for the next task that can start; None if there is none."""
        ready = (
            task for task in waiting if task.seed in curves or not EVERY[task.method].needs_plain
        )
        task = next(ready, None)
        if task is None or time.monotonic() > deadline:
            return None
        waiting.remove(task)
        return run(replace(task, plain=curves.get(task.seed)))

    def noted(row: dict[str, Any]) -> dict[str, Any]:
        if "curve" in row:
            curves[row["seed"]] = tuple(row["curve"])
        return row

    if args.jobs == 1:
        while row := started(lambda task: perform(task, args)):
            yield noted(row)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=_end_with_parent) as pool:
        running: set[Future[dict[str, Any]]] = set()
        while True:
            while len(running) < args.jobs and (
                future := started(lambda task: pool.submit(perform, task, args))
            ):
                running.add(future)
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                yield noted(each.result())
