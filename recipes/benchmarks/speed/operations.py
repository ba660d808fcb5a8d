"""How many operations a step is made of: on a GPU each is a launch, and a small one costs no less.

    python -m recipes.benchmarks.speed.operations    # seconds, on a CPU: speed does not matter

A Llama of 16 narrow layers under autocast to bfloat16, as a GPU trains it; counted is what PyTorch
dispatches and computes, views left out: forward and backward of a plain step, of one whose exits
are read, and of one with masked runs, whole and in parts. Writes
``results/operations.json``.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import softtrace
from recipes.benchmarks.places import RESULTS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

SOURCE = str(Path(softtrace.__file__).parent)
LAYERS, HEADS, VOCABULARY = 16, 12, 64
VIEWS = {
    *("view", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "detach"),
    *("alias", "permute", "split", "split_with_sizes", "unbind", "as_strided", "diagonal"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "scalar_tensor"),
}
PARTS = {"record": "recording", "exit_logits": "masked run", "_size": "sizes", "_exits": "exits"}


class Counting(TorchDispatchMode):
    """Counts operations by the part of the term that asked for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function._schema.name.partition("::")[2] not in VIEWS:
            own = [each for each in traceback.extract_stack() if each.filename.startswith(SOURCE)]
            part = next((PARTS[each.name] for each in own if each.name in PARTS), None)
            self.found[part or ("rest of the term" if own else "model")] += 1
        return function(*args, **(kwargs or {}))


def counts(every: int | None, step: int) -> dict[str, int]:
    """Of a forward with the term and of the backward pass; ``every`` None leaves the term out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(VOCABULARY, (8, 32))
    density = (
        None if every is None else softtrace.DensityLoss(model, every=every, share=0.5, crop=8)
    )
    with torch.autocast("cpu", torch.bfloat16), Counting() as forward:
        if density is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:
            with density.watching(step=step):
                loss = model(input_ids=ids, labels=ids).loss
            loss = loss + density(ids, step=step).loss
    with Counting() as backward:
        loss.backward()
    found = {**forward.found, "backward": backward.found.total()}
    return {**found, "all": sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "operations.json")
    args = parser.parse_args()
    steps = {"plain": (None, 0), "exits read": (8, 1), "masked runs": (8, 0)}
    found = {name: counts(*how) for name, how in steps.items()}
    settings = {"layers": LAYERS, "heads": HEADS, "pattern": "Llama", "autocast": "bfloat16"}
    write_json(
        args.out,
        {"settings": settings, "operations": found, **provenance(torch.device("cpu"))},
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
