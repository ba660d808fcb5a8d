"""What a training step costs where the model is sharded by FSDP2, with random weights.

    torchrun --nproc_per_node 2 -m recipes.benchmarks.speed.sharded            # 8B and 1B, two GPUs
    torchrun --nproc_per_node 2 -m recipes.benchmarks.speed.sharded --models Qwen3-8B --compiled
    torchrun --nproc_per_node 1 -m recipes.benchmarks.speed.sharded --models Llama-3.2-1B
    torchrun --nproc_per_node 2 -m recipes.benchmarks.speed.sharded --models tiny   # CPUs, gloo

One model, bfloat16 weights and AdamW, every layer a unit and run again in the backward pass (unless
``--keep-activations``), 2,048 tokens a row, as many rows in each process however many there are.
Periods of 8 steps with the default term and without it take turns on the same model, so that a
period is compared with its neighbour; with ``--compiled`` every layer is compiled, for both.
Peak memory is of the first process. ``results/sharded.json`` is written when a model's measurement
ends; what it holds of other models, numbers of processes and kinds stays. The pages compare
processes that were measured on the same hardware, so run one after the other on one machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers
from torch.distributed.fsdp import fully_shard

import softtrace
from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed import sizes
from softtrace.evaluation.decode_race import quartiles
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

#: name -> (stem of the classes, sizes as the model's card states them)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("Llama", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    }),
    "Qwen3-8B": ("Qwen3", {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936,
    }),
    "Llama-3.2-1B": sizes.MODELS["Llama-3.2-1B"],
    "tiny": ("Llama", {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 67,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
PERIOD = 8


def build(name: str, device: torch.device, recomputed: bool, compiled: bool) -> Any:
    """The model in parts, which never was whole anywhere."""
    stem, numbers = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(max_position_embeddings=4096, **numbers)
    with torch.device("meta"):
        model = getattr(transformers, f"{stem}ForCausalLM")(config).to(torch.bfloat16).train()
    model.tie_weights()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for weight in model.parameters():
            part = weight.to_local()
            part.normal_(0, 0.02) if weight.dim() > 1 else part.fill_(1)
    # The only buffers, which are no weights: frequencies of the positions.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if recomputed:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if compiled:
        for layer in model.model.layers:
            # on a CPU the script is tried; kernels in C++ take half a minute and show nothing
            layer.compile(backend="aot_eager" if device.type == "cpu" else "inductor")
    return model


class Training:
    """Steps of one model, with the term or without."""

    def __init__(self, model: Any, device: torch.device, rows: int, length: int) -> None:
        self.model, self.device = model, device
        self.density = softtrace.DensityLoss(model)
        self.optimiser = torch.optim.AdamW(model.parameters(), 1e-6)
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        highest = model.config.vocab_size
        self.ids = torch.randint(3, highest, (rows, length), generator=generator).to(device)
        self.number = 0
        self.exits: set[bool] = set()

    def step(self, with_term: bool) -> None:
        ids = self.ids.roll(self.number)
        if with_term:
            with self.density.watching(step=self.number) as watched:
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            term = self.density(ids, step=self.number, watched=watched)
            self.exits.add(term.exit_distance is not None)
            loss = loss + term.loss
        else:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.number += 1

    def period(self, with_term: bool) -> tuple[float, int]:
        """Mean seconds of a step, and the peak memory in bytes (0 on a CPU)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(PERIOD):
            self.step(with_term)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / PERIOD
        return seconds, torch.cuda.max_memory_allocated() if cuda else 0


def measured(training: Training, rounds: int) -> dict[str, Any]:
    """Times and memory of both ways, and their ratios, round by round."""
    seconds: dict[str, list[float]] = {"plain": [], "default": []}
    memory = dict.fromkeys(seconds, 0)
    for number in range(rounds + 1):
        for way in seconds:
            taken, peak = training.period(way == "default")
            if number:  # the first round warms up, and compiles
                seconds[way].append(taken)
                memory[way] = max(memory[way], peak)
        if not number:
            compiled = graphs()
    pairs = zip(seconds["default"], seconds["plain"], strict=True)
    return {
        "seconds": {way: quartiles(found) for way, found in seconds.items()},
        "time": quartiles([own / plain for own, plain in pairs]),
        "gib": {way: peak / 2**30 for way, peak in memory.items()},
        "memory": memory["default"] / memory["plain"] if memory["plain"] else None,
        "rounds": rounds,
        "exits read": training.exits == {True},
        "graphs compiled": [compiled, graphs()],  # in the first round, and by the end of the last
    }


def graphs() -> int:
    """How many graphs ``torch.compile`` has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def let_go(cuda: bool) -> None:
    """Nothing of a model is left where the next one is measured."""
    gc.collect()  # units of FSDP2 refer to each other in a circle
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if cuda:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["Llama-3.1-8B", "Llama-3.2-1B"],
                        choices=list(MODELS))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2, help="of a process")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--keep-activations", action="store_true", help="no recomputation")
    parser.add_argument("--compiled", action="store_true", help="every layer by itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded.json")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    for name in args.models:
        model = build(name, device, not args.keep_activations, args.compiled)
        found = measured(Training(model, device, args.rows, args.length), args.rounds)
        del model
        let_go(cuda)
        if rank:
            continue
        kept = json.loads(args.out.read_text("utf-8"))["models"] if args.out.exists() else {}
        activations = "kept" if args.keep_activations else "recomputed"
        kind = f"activations {activations}" + (", compiled" if args.compiled else "")
        kept.setdefault(name, {})[f"{world} processes, {kind}"] = {
            "processes": world, "kind": kind, "batch": [args.rows, args.length], **found,
            **provenance(device),
        }  # fmt: skip
        print(name, world, kind, json.dumps(found), flush=True)
        write_json(args.out, {
            "precision": "bfloat16 weights and optimiser", "steps_a_turn": PERIOD, "models": kept,
            **provenance(device),
        })  # fmt: skip
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
