"""``softtrace fit`` itself with a configuration for several GPUs, on random weights.

    python -m recipes.benchmarks.speed.fitted --tokenizer DIR    # two GPUs, 100 GB of disk
    python -m recipes.benchmarks.speed.fitted --configs qwen3-8b-2gpus --tokenizer DIR
    python -m recipes.benchmarks.speed.fitted --tiny --tokenizer DIR    # CPUs: to try the script

The model has random weights in bfloat16 at the size that its card states, and lies in a folder as
one from the hub would, with a tokenizer of fewer tokens than it has. The command that the
configuration's first line names is run with this folder, this project's own source as the text, and
a few steps. Found are the peak memory of the first process as Lightning's ``DeviceStatsMonitor``
logs it, the seconds of the whole command, and whether what it saved is a whole model: whether all
its weights are there, in the type and shapes of the one that it began with. Writes
``results/fitted.json`` after every configuration.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from recipes.benchmarks.places import RESULTS, ROOT
from recipes.benchmarks.speed.sharded import MODELS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

#: configuration -> model
CONFIGS = {"llama-3.1-8b-2gpus": "Llama-3.1-8B", "qwen3-8b-2gpus": "Qwen3-8B"}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 50_000}  # fmt: skip
TINY_OPTIONS = ["--trainer.accelerator", "cpu", "--data.block_size", "128"]


def make_model(name: str, tokenizer: Path, folder: Path, tiny: bool) -> None:
    """A folder as one from the hub."""
    stem, numbers = MODELS[name]
    sizes = {**numbers, **(TINY if tiny else {}), "max_position_embeddings": 4096}
    config = getattr(transformers, f"{stem}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{stem}ForCausalLM")(config).to(torch.bfloat16)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    model.save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    del model, weight
    torch.cuda.empty_cache()  # the GPU is the command's


def weights_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every weight that a folder's files hold; none of them is loaded."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def highest(log: Path, column: str) -> float | None:
    """The largest number that a run's log has in the columns that end so."""
    with log.open(encoding="utf-8", newline="") as file:
        values = [
            float(value) for row in csv.DictReader(file) for name, value in row.items()
            if name.endswith(column) and value
        ]  # fmt: skip
    return max(values, default=None)


def fitted(config: str, model: Path, text: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """What is found of one configuration."""
    command = [
        *("fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--model.path", str(model)),
        *("--data.path", str(text), "--data.held_out_share", "0", "--out", str(out)),
        *("--trainer.callbacks+=lightning.pytorch.callbacks.DeviceStatsMonitor",),
        *("--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "null", *options),
    ]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "softtrace.cli", *command], check=True)
    seconds = time.perf_counter() - began
    log = max(out.glob("logs/**/metrics.csv"), key=lambda path: path.stat().st_mtime)
    peak = highest(log, "allocated_bytes.all.peak")
    return {
        "options": options,
        "seconds of the command": seconds,
        "peak GB": None if peak is None else peak / 1e9,
        "steps": int(highest(log, "step") or 0) + 1,
        "whole": weights_of(out) == weights_of(model),
    }


def main() -> None:
    """Run the configurations, and write what is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder that holds one")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="a few weights, on CPUs")
    parser.add_argument("--out", type=Path, default=RESULTS / "fitted.json", help="result file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for config in args.configs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(CONFIGS[config], args.tokenizer, folder / "model", args.tiny)
            pages = sorted(p for part in ("recipes", "src") for p in (ROOT / part).rglob("*.py"))
            text = folder / "text.txt"
            text.write_text("\n".join(each.read_text("utf-8") for each in pages), "utf-8")
            options = ["--trainer.max_steps", str(args.steps), *(TINY_OPTIONS if args.tiny else [])]
            found[config] = fitted(config, folder / "model", text, folder / "out", options)
        print(config, json.dumps(found[config]), flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_json(args.out, {"configs": found, **provenance(device)})


if __name__ == "__main__":
    main()
