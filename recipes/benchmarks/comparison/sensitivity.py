"""Which conclusions about real models survive another definition; and how exact readings are.

    python -m recipes.benchmarks.comparison.sensitivity tokens --models DIR --prose DIR
    python -m recipes.benchmarks.comparison.sensitivity measure --models DIR [--only smollm2-135m]
    python -m recipes.benchmarks.comparison.sensitivity summarise

Both pretrained models (``python -m recipes.real_models DIR``) on three texts (prose, Python source,
C++ source), at 64, 256 and 1,024 tokens; and SmolLM2 after a short fine-tuning on prose, plain and
with the default penalty, whose order is one of the conclusions. ``tokens`` makes the blocks,
``measure`` wants a GPU and resumes where it stopped (a file a measurement in RUNS), ``summarise``
writes ``results/sensitivity.json``.

Each measurement also holds 75 thresholds of some tokens, from which grids of thresholds are
chosen and judged (:mod:`recipes.benchmarks.correctness.thresholds`), and exact runs of some
positions, from which the error of one run for all positions follows.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
import time
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import softtrace
from recipes.benchmarks.places import RESULTS, ROOT
from softtrace.data import Document, even_places, evenly, pack, read_documents
from softtrace.density.sweep import density_curve
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.study.sensitivity import (
    Definition,
    Reading,
    conclusions,
    read_definitions,
)
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.tracing.masking import AttentionKind

RUNS = ROOT / "runs" / "sensitivity"
MODELS = ("smollm2-135m", "gemma3-270m")
TEXTS = ("prose", "python", "c++")
BLOCKS = {64: 32, 256: 16, 1024: 4}
STEPS, ROWS, LENGTH, RATE = 300, 16, 512, 2e-4
DENSE: list[float] = torch.linspace(5, -16, 75, dtype=torch.float64).sigmoid().tolist()
SAMPLED = 256  # tokens of a measurement whose curves are kept at all of these thresholds
EXACT = {64: 48, 256: 48, 1024: 16}  # positions that are also run one by one
DEFINITIONS = tuple(
    Definition(attention, norm, stand_in, grid)
    for attention in get_args(AttentionKind)
    for norm, stand_in, grids in (
        ("l1", "nothing", ("11", "26", "90")),
        ("l1", "mean", ("11", "26")),
        ("l2", "nothing", ("11",)), ("ifr", "nothing", ("11",)),
    )
    for grid in grids
)  # fmt: skip
RESAMPLES, SEED = 1000, 0


def documents(text: str, prose: Path) -> list[Document]:
    """60 documents of a text that nobody here trained on, evenly spaced."""
    packages = Path(sysconfig.get_paths()["purelib"])
    found = {
        "prose": lambda: read_documents(prose / "held_out.jsonl"),
        "python": lambda: read_documents(packages / "matplotlib", (".py",)),
        "c++": lambda: read_documents(packages / "torch" / "include" / "ATen", (".h", ".cuh")),
    }[text]()
    return [found[place] for place in even_places(len(found), 60).tolist()]


def make_tokens(models: Path, prose: Path) -> None:
    """Blocks of every model, text and length, and those of the fine-tuning."""
    found: dict[str, Tensor] = {}
    for model in MODELS:
        tokenizer = load_tokenizer(models / model)
        for text, (length, count) in itertools.product(TEXTS, BLOCKS.items()):
            blocks = evenly(pack(documents(text, prose), tokenizer, length), count)
            found[f"{model} {text} {length}"] = blocks.to(torch.int32)
    tokenizer = load_tokenizer(models / MODELS[0])
    train = pack(read_documents(prose / "train.jsonl")[:1500], tokenizer, LENGTH)
    found["training"] = train[: STEPS * ROWS].to(torch.int32)
    RUNS.mkdir(parents=True, exist_ok=True)
    save_file(found, RUNS / "tokens.safetensors")


def measure(models: Path, only: str | None, of_text: str | None) -> None:
    """Every measurement that is not there yet, each written when it is done.

    Args:
        models: folder of the models.
        only: of one model; None for all.
        of_text: on one text, or ``"trained"`` for the fine-tuned pair; None for all.
    """
    tokens = load_file(RUNS / "tokens.safetensors")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in MODELS:
        if only in (None, name):
            model = load_model(models / name).to(device).eval()
            texts = [text for text in TEXTS if of_text in (None, text)]
            for text, length in itertools.product(texts, BLOCKS):
                _measure(model, tokens[f"{name} {text} {length}"].long(), f"{name} {text} {length}")
    if only in (None, MODELS[0]) and of_text in (None, "trained"):
        for way, strength in (("plain", 0.0), ("penalty", None)):
            out = f"{MODELS[0]} {way} prose 256"
            if (RUNS / f"{out}.safetensors").exists():
                continue
            model = load_model(models / MODELS[0]).to(device)
            fine_tune(model, tokens["training"].long(), strength)
            _measure(model.eval(), tokens[f"{MODELS[0]} prose 256"].long(), out)


def fine_tune(model: Any, blocks: Tensor, strength: float | None) -> None:
    """AdamW on blocks in order, under bfloat16 autocast, with the penalty's defaults or without."""
    penalty = softtrace.DensityLoss(model, **({} if strength is None else {"strength": strength}))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    device = next(model.parameters()).device
    for step, rows in enumerate(torch.split(blocks, ROWS)):
        ids = rows.to(device)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            with penalty.watching() as watched:
                loss = model(input_ids=ids, labels=ids).loss
            term = penalty(ids, labels=ids, watched=watched)
        (loss + term.loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def _measure(model: nn.Module, blocks: Tensor, name: str) -> None:
    path = RUNS / f"{name}.safetensors"
    if path.exists():
        return
    began, length = time.perf_counter(), blocks.shape[1]
    first = length // 2
    found: dict[str, Tensor] = {}
    readings = read_definitions(
        model, blocks, first=first, batch_size=len(blocks), progress=lambda _: None,
        definitions=DEFINITIONS,
    )  # fmt: skip
    for definition, reading in readings.items():
        found.update({f"{definition} {key}": value for key, value in vars(reading).items()})
    ids = blocks.to(next(model.parameters()).device)
    explained = torch.zeros_like(ids, dtype=torch.bool)
    explained[:, first:-1] = True
    sampled = _spread(explained, SAMPLED)
    exact = _spread(explained, EXACT[length])
    for kind in ("recorded", "recomputed"):
        curve = density_curve(model, ids, thresholds=DENSE, attention=kind, positions=sampled)
        found[f"dense {kind} size"] = curve.size[:, sampled]
        found[f"dense {kind} variation"] = curve.total_variation[:, sampled]
        found[f"dense {kind} edges"] = curve.edges[sampled]
    for kind in ("recomputed", "kept"):
        for way, alone in (("alone", True), ("together", False)):
            curve = density_curve(model, ids, attention=kind, exact=alone, positions=exact)
            found[f"exact {kind} {way} variation"] = curve.total_variation[:, exact]
            found[f"exact {kind} {way} area"] = curve.area()[exact]
            found[f"exact {kind} {way} size"] = curve.size_at()[exact]
    RUNS.mkdir(parents=True, exist_ok=True)
    seconds = f"{time.perf_counter() - began:.0f}"
    hardware = str(provenance(ids.device)["hardware"])
    save_file(
        {key: value.float().contiguous().cpu() for key, value in found.items()},
        path, {"seconds": seconds, "hardware": hardware},
    )  # fmt: skip
    print(f"{name}: {seconds} s", flush=True)


def _spread(places: Tensor, count: int) -> Tensor:
    """``count`` of the places that are True, evenly spaced."""
    chosen = evenly(places.flatten().nonzero()[:, 0], count)
    found = torch.zeros_like(places).flatten()
    found[chosen] = True
    return found.reshape(places.shape)


def readings_of(name: str) -> dict[Definition, Reading]:
    """What :func:`measure` left of one measurement."""
    tensors = load_file(RUNS / f"{name}.safetensors")
    keys = ("variation", "area", "size", "entropy")
    return {
        definition: Reading(*(tensors[f"{definition} {key}"] for key in keys))
        for definition in sorted(DEFINITIONS)
    }


def summarise() -> None:
    """results/sensitivity.json: every definition's numbers and verdicts, and errors of one run."""
    measurements = []
    for model, text, length in itertools.product(MODELS, TEXTS, BLOCKS):
        name = f"{model} {text} {length}"
        measurements.append({
            "model": model, "text": text, "tokens": length, "sequences": BLOCKS[length],
            "definitions": conclusions([readings_of(name)], RESAMPLES, SEED),
            "one_run_for_all_positions": one_run_error(name),
        })  # fmt: skip
        print(name, flush=True)
    pair = [readings_of(f"{MODELS[0]} {way} prose 256") for way in ("plain", "penalty")]
    with safe_open(RUNS / f"{MODELS[0]} prose 1024.safetensors", "pt") as file:
        hardware = (file.metadata() or {}).get("hardware")
    write_json(RESULTS / "sensitivity.json", {
        "readings": measurements,
        "order": {
            "models": [f"{MODELS[0]}, {STEPS} steps, {way}" for way in ("plain", "penalty")],
            "text": "prose", "tokens": 256, "sequences": BLOCKS[256],
            "definitions": conclusions(pair, RESAMPLES, SEED),
        },
        "measured_on": hardware,
        **provenance(torch.device("cpu")),
    })  # fmt: skip


def one_run_error(name: str) -> dict[str, Any]:
    """How far one run for all positions is off a run for each, attention recomputed or kept."""
    tensors = load_file(RUNS / f"{name}.safetensors")
    found = {}
    for kind in ("recomputed", "kept"):
        alone, together = (
            {key: tensors[f"exact {kind} {way} {key}"] for key in ("variation", "area", "size")}
            for way in ("alone", "together")
        )
        off = (together["variation"] - alone["variation"]).abs()
        found[kind] = {
            "positions": len(alone["area"]),
            "tv_mean_absolute": float(off.mean()),
            "tv_largest": float(off.max()),
            "area_mean": float((together["area"] - alone["area"]).mean()),
            "area_mean_absolute": float((together["area"] - alone["area"]).abs().mean()),
            "median_size": [float(each["size"].median()) for each in (alone, together)],
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("tokens", "measure", "summarise"))
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "models")
    parser.add_argument("--prose", type=Path, default=ROOT / "runs" / "prose")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--text", choices=(*TEXTS, "trained"))
    args = parser.parse_args()
    if args.stage == "tokens":
        make_tokens(args.models, args.prose)
    elif args.stage == "measure":
        measure(args.models, args.only, args.text)
    else:
        summarise()
