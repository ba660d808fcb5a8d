"""What a training step costs at the sizes of real models, with random weights, on a GPU.

    python -m recipes.benchmarks.speed.steps           # about five minutes on one GPU
    python -m recipes.benchmarks.speed.steps --models SmolLM2-135M --ways plain balanced

Each way to train takes periods of 8 steps in turn with all others of the same model, AdamW and
bfloat16 autocast included, and is given over a plain step: eager, and with the model compiled. Peak
memory, as reserved, is over a plain step's, weights and optimiser included. Also whether a replayed
term has the gradients of one that was run as it is. Writes ``results/steps.json`` after each model.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import softtrace
from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed import sizes
from recipes.benchmarks.speed.timing import seconds
from softtrace.evaluation.decode_race import quartiles
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.loss.options import PRESETS

#: name -> (stem of the classes, sizes as the model's card states them)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("Llama", {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True,
    }),
    "Gemma-3-270M": ("Gemma3", {
        "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048,
        "vocab_size": 262144, "tie_word_embeddings": True,
    }),
    "Llama-3.2-1B": sizes.MODELS["Llama-3.2-1B"],
}  # fmt: skip
CONFIGS = {"Gemma3": "Gemma3TextConfig"}

#: way -> options of the term; None leaves it out
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{preset: {"preset": preset} for preset in PRESETS},
    **{f"{preset}, fused": {"preset": preset, "fuse": True} for preset in ("balanced", "sparse")},
    **{
        f"{preset}, not fused": {"preset": preset, "fuse": False}
        for preset in ("balanced", "sparse")
    },
    "balanced, exit tokens 0.125": {"preset": "balanced", "exit_tokens": 0.125},
    "balanced, exits every 2nd": {"preset": "balanced", "exit_every": 2},
    "balanced, not captured": {"every": 2, "share": 0.15, "cuda_graph": False},
    "balanced, every 8th, share 0.3": {"every": 8, "share": 0.3},
    "exits alone": {"every": 1_000_000},
}
ROWS, LENGTH, PERIOD = 16, 512, 8
REPLAYS = "replays, milliseconds"


class Way:
    """One way to train a model of its own.

    Args:
        sizes_of: stem of the classes and sizes, one of :data:`MODELS`.
        options: of the term; None leaves it out.
        compiled: whether the model is.
        batch: rows and tokens of a row.
        device: "cuda", or "cpu" to see that it works.
    """

    def __init__(
        self,
        sizes_of: tuple[str, dict[str, Any]],
        options: dict[str, Any] | None,
        compiled: bool = False,
        batch: tuple[int, int] = (ROWS, LENGTH),
        device: str = "cuda",
    ) -> None:
        stem, numbers = sizes_of
        config = getattr(transformers, CONFIGS.get(stem, f"{stem}Config"))(**numbers)
        torch.manual_seed(0)
        self.device = device
        with torch.device(device):
            self.model = getattr(transformers, f"{stem}ForCausalLM")(config).train()
        self.density = None if options is None else softtrace.DensityLoss(self.model, **options)
        if compiled:
            self.model.compile()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-5)
        self.number = 0
        self.ids = torch.randint(min(40_000, numbers["vocab_size"]), batch, device=device)

    def step(self) -> None:
        """One training step."""
        ids = self.ids.roll(self.number)
        with torch.autocast(self.device, torch.bfloat16):
            if self.density is None:
                loss = self.model(input_ids=ids, labels=ids).loss
            else:
                with self.density.watching(step=self.number, batch={"input_ids": ids}) as watched:
                    loss = self.model(input_ids=ids, labels=ids).loss
                loss = loss + self.density(ids, step=self.number, watched=watched).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.number += 1

    def period(self) -> float:
        """Mean seconds of a period's steps."""
        return seconds(lambda: [self.step() for _ in range(PERIOD)]) / PERIOD


def measured(name: str, ways: list[str], rounds: int, compiled: bool) -> dict[str, Any]:
    """Times and memory of the ways to train one model."""
    built, memory, first = {}, {}, {}
    for way in ways:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        built[way] = Way(MODELS[name], WAYS[way], compiled)
        began = time.perf_counter()
        for _ in range(3):  # of the captured ones: until their graph is there
            built[way].period()
        first[way] = time.perf_counter() - began
        torch.cuda.empty_cache()  # what compiling and capturing took
        torch.cuda.reset_peak_memory_stats()
        built[way].period()
        memory[way] = torch.cuda.max_memory_reserved() - before  # graphs keep some that is free
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, each in built.items():
            each.step()  # in training a step follows one of the same model
            taken[way].append(each.period())
    plain = taken["plain"]
    return {
        way: {
            "time": quartiles([a / b for a, b in zip(taken[way], plain, strict=True)]),
            "seconds": quartiles(taken[way]),
            "seconds of the first steps": first[way],
            "memory": memory[way] / memory["plain"],
            "rounds": rounds,
        }
        for way in ways
    }


def replays(name: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one replay: of the masked runs' graph and of the exits', fused and not."""
    found: dict[str, dict[str, float]] = {}
    for fuse in (False, True):
        options = {"preset": "balanced", "every": 1, "share": 0.15, "fuse": fuse}
        way = Way(MODELS[name], options)
        assert way.density is not None
        for _ in range(4):
            way.step()
        parts = {"masked runs": way.density._captured, "exits": way.density._exit_term}
        found["fused" if fuse else "as it is"] = {
            part: 1e3 * seconds(lambda g=graph: [g._graph.replay() for _ in range(10)]) / 10  # type: ignore[misc]
            for part, term in parts.items()
            for graph in term.graphs.known.values()
        }
        del way, parts
        torch.cuda.empty_cache()
    return found


def gradient_error(name: str) -> dict[str, float]:
    """Largest relative differences of a replayed term from the same term run as it is, float32."""
    options: dict[str, Any] = {"preset": "sparse", "every": 1, "share": 0.15}
    way = Way(MODELS[name], options)
    assert way.density is not None
    weights = [each for each in way.model.parameters() if each.requires_grad]

    def term_at(step: int, captured: bool) -> tuple[float, torch.Tensor]:
        loss = softtrace_term(way.density, captured, way.ids.roll(step), step)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return float(loss.detach()), torch.cat(
            [g.flatten().float() for g in found if g is not None]
        )

    def softtrace_term(density: Any, captured: bool, ids: torch.Tensor, step: int) -> torch.Tensor:
        if captured:
            return density(ids, step=step).loss
        plain = softtrace.DensityLoss(way.model, **options, cuda_graph=False)
        return plain(ids, step=step).loss

    for step in range(4):
        term_at(step, captured=True)
        way.step()  # weights move between the capture and its replays
    assert way.density._captured.graphs.known, "nothing was captured, so nothing is replayed"
    errors: dict[str, list[float]] = {"term": [], "gradients": [], "gradients, run twice": []}
    for step in range(4, 8):
        loss, replayed = term_at(step, captured=True)
        plain_loss, plain = term_at(step, captured=False)
        _, again = term_at(step, captured=False)
        errors["term"].append(abs(loss - plain_loss) / abs(plain_loss))
        errors["gradients"].append(float((replayed - plain).norm() / plain.norm()))
        errors["gradients, run twice"].append(float((again - plain).norm() / plain.norm()))
    return {key: max(values) for key, values in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="*", default=["eager", "compiled", REPLAYS],
                        help="of a model, and what replays take")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "steps.json")
    args = parser.parse_args()
    ways = ["plain", *(way for way in args.ways if way != "plain")]
    found: dict[str, Any] = {}
    if args.out.exists():  # of models, kinds and ways that are not measured now
        found = json.loads(args.out.read_text(encoding="utf-8"))["models"]
    for name in args.models:
        found.setdefault(name, {})["replayed, float32"] = gradient_error(name)
        print(name, found[name]["replayed, float32"], flush=True)
        made = provenance(torch.device("cuda"))
        for kind in args.kinds:
            if kind == REPLAYS:
                found[name][REPLAYS] = replays(name)
                continue
            new = measured(name, ways, args.rounds, kind == "compiled")
            gc.collect()
            torch.cuda.empty_cache()
            print(name, kind, json.dumps(new, indent=1), flush=True)
            new = {way: {**row, "measured": made} for way, row in new.items()}
            found[name][kind] = {**found[name].get(kind, {}), **new}
        write_json(args.out, {
            "batch": [ROWS, LENGTH], "precision": "bfloat16 autocast", "steps_a_turn": PERIOD,
            "options": WAYS, "models": found, **made,
        })  # fmt: skip


if __name__ == "__main__":
    main()
