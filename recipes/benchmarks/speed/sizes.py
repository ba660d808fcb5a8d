"""Attaching and tracing at the sizes of real models, with random weights, on an accelerator.

    python -m recipes.benchmarks.speed.sizes            # about two minutes on one GPU

Nothing is downloaded: each model is built from the sizes that its card states, in bfloat16. For
each: seconds to attach (the proof included), then interleaved medians of the model's own forward
and of ``edge_importance`` on the same batch, and the peak memory of both beyond the weights.
Writes ``results/sizes.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import softtrace
from recipes.benchmarks.places import RESULTS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

#: name -> (stem of the classes, sizes as the model's card states them)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": ("Qwen3", {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "Llama-3.2-1B": ("Llama", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
        "tie_word_embeddings": True,
    }),
    "OLMo-2-1B": ("Olmo2", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 8192, "vocab_size": 100352,
    }),
    "Gemma-2-2B": ("Gemma2", {
        "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216,
        "vocab_size": 256000,
    }),
    "Pythia-1.4B": ("GPTNeoX", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 8192, "vocab_size": 50304, "use_parallel_residual": True,
    }),
    "GPT-J-6B": ("GPTJ", {
        "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400,
    }),
}  # fmt: skip
ROWS, LENGTH, ROUNDS = 4, 512, 9


def build(name: str) -> Any:
    """Random weights of the model's initialisation, on the GPU."""
    stem, sizes = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**sizes)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
    return model.to(torch.bfloat16).eval()


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and peak GiB beyond what was held before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    return time.perf_counter() - began, peak


@torch.no_grad()
def measured(name: str) -> dict[str, Any]:
    """One model's row."""
    model = build(name)
    ids = torch.randint(50_000, (ROWS, LENGTH), device="cuda")
    attach_seconds, _ = timed(lambda: softtrace.attach(model))
    instrument = softtrace.attach(model)
    runs = {
        "forward": lambda: model(input_ids=ids, use_cache=False),
        "edge_importance": lambda: softtrace.edge_importance(model, ids),
    }
    found: dict[str, list[tuple[float, float]]] = {key: [] for key in runs}
    for turn in range(ROUNDS + 1):
        for key, run in runs.items():
            result = timed(run)
            if turn:  # the first is a warm-up
                found[key].append(result)
    seconds = {key: [each[0] for each in values] for key, values in found.items()}
    ratios = [b / a for a, b in zip(seconds["forward"], seconds["edge_importance"], strict=True)]
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pattern": instrument.anatomy.pattern,
        "attention": instrument.anatomy.route,
        "attach_seconds": attach_seconds,
        "proof": instrument.verification.largest,
        "forward_seconds": statistics.median(seconds["forward"]),
        "edge_importance_seconds": statistics.median(seconds["edge_importance"]),
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "forward_peak_gib": max(each[1] for each in found["forward"]),
        "edge_importance_peak_gib": max(each[1] for each in found["edge_importance"]),
    }


def main() -> None:
    """Measure every model and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "sizes.json")
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        rows.append(measured(name))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    result = {"rows": ROWS, "length": LENGTH, "dtype": "bfloat16", "rounds": ROUNDS}
    write_json(options.out, {**result, "models": rows, **provenance(torch.device("cuda"))})


if __name__ == "__main__":
    main()
