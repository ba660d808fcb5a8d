"""Speed, precision and memory of tracing on the shipped model and real text.

    python -m recipes.benchmarks.speed.tracing

1. Speed: a ``density_curve`` of 16 x 40 tokens on one thread, against the full curve of a slow
   literal oracle (``tests/support/oracle.py``: every edge vector materialised, a networkx
   multigraph, heap search, one masked run a size), interleaved, per explained position. The oracle
   explains every fifth position of a prompt (early ones have smaller graphs), ours all of all
   prompts.
2. Precision: what reading curves from the default thresholds changes against 211 thresholds.
3. Memory: peak resident memory of ``edge_importance`` at two lengths, in processes of their own.
4. Cost of the penalty: a training step with the default penalty over a plain one, interleaved.

Writes ``results/tracing.json``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

import softtrace
from recipes.benchmarks.places import MODEL, RESULTS
from recipes.benchmarks.speed.timing import seconds, spread
from softtrace.data import pack, read_documents, split_by_file
from softtrace.density.curve import SIZES, default_thresholds
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.loading import load_model, load_tokenizer

LENGTHS = (256, 512)


def text_blocks(length: int, count: int) -> Tensor:
    """Blocks of matplotlib's source, which the model never saw, evenly spaced."""
    folder = Path(matplotlib.__file__).parent
    documents = split_by_file(read_documents(folder, (".py",)), 0.1)[1]
    blocks = pack(documents, load_tokenizer(MODEL), length)
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]


def speed(model: torch.nn.Module, rounds: int) -> dict[str, Any]:
    """Ratio of the oracle's mean time for one position to ours for one of 640."""
    from tests.support.oracle import full_curve

    torch.set_num_threads(1)
    batch, length = 16, 40
    ids = text_blocks(length, batch)
    positions = range(4, length, 5)
    softtrace.density_curve(model, ids)
    ours, oracle, last = [], [], []
    for turn in tqdm(range(rounds), desc="speed"):
        row = ids[turn % batch][None]
        curves, slow = [], []
        for position in positions:
            slow.append(seconds(lambda: full_curve(model, row, position, SIZES)))  # noqa: B023
            curves.append(seconds(lambda: softtrace.density_curve(model, ids)) / ids.numel())
        ours.append(statistics.mean(curves))
        oracle.append(statistics.mean(slow))
        last.append(slow[-1])
    return {
        "batch": [batch, length],
        "threads": 1,
        "thresholds": len(default_thresholds()),
        "oracle_positions": list(positions),
        "seconds_per_position": spread(ours),
        "oracle_seconds_per_position": spread(oracle),
        "oracle_seconds_last_position": spread(last),
        "times_faster": spread([slow / fast for slow, fast in zip(oracle, ours, strict=True)]),
    }


def precision(model: torch.nn.Module, count: int) -> dict[str, Any]:
    """Readings from the default thresholds against those from 211."""
    torch.set_num_threads(2)
    ids = text_blocks(64, count)
    explained = slice(32, 63)
    dense = torch.linspace(5, -16, 211, dtype=torch.float64).sigmoid().tolist()
    curves = [softtrace.density_curve(model, ids, thresholds=grid) for grid in (None, dense)]
    area, exact_area = (curve.area()[:, explained].flatten() for curve in curves)
    size, exact_size = (curve.size_at()[:, explained].flatten() for curve in curves)
    read, exact = (curve.at_sizes()[:, :, explained].flatten(1) for curve in curves)
    easy = curves[0].entropy[:, explained].flatten()
    easy = easy <= easy.quantile(0.25)
    return {
        "positions": area.numel(),
        "thresholds": len(curves[0].thresholds),
        "reference_thresholds": len(dense),
        "area_mean_difference": float((area - exact_area).mean()),
        "area_mean_absolute_difference": float((area - exact_area).abs().mean()),
        "total_variation_mean_absolute_difference": float((read - exact).abs().mean()),
        "median_size_ratio": {
            "all": float(size.median() / exact_size.median()),
            "easy": float(size[easy].median() / exact_size[easy].median()),
        },
    }


def memory() -> dict[str, Any]:
    """Peak memory of ``edge_importance`` over that of an idle process with the same model."""
    found = {}
    for length in LENGTHS:
        command = [sys.executable, "-m", "recipes.benchmarks.speed.tracing"]
        command += ["--peak-of", str(length)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[length] = int(output.split()[-1])
    config = load_model(MODEL).config
    heads, layers, width = config.num_attention_heads, config.num_hidden_layers, config.hidden_size
    rows = {}
    for length, peak in found.items():
        scalars = 4 * layers * heads * length**2
        rows[str(length)] = {
            "peak_bytes": peak,
            "importance_bytes": scalars,
            "peak_over_importance": peak / scalars,
            "edge_vectors_of_one_layer_bytes": 4 * heads * length**2 * width,
        }
    growth = found[LENGTHS[1]] / found[LENGTHS[0]]
    return {"lengths": rows, "growth": growth, "length_ratio": LENGTHS[1] / LENGTHS[0]}


def peak_of(length: int) -> int:
    """Bytes that one call adds to the peak resident memory of this process (Linux)."""
    torch.set_num_threads(1)
    model = load_model(MODEL)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    with torch.no_grad():
        softtrace.edge_importance(model, ids[:, :8])  # attaches, loads kernels
        # getrusage would start from the peak of the process that forked this one
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        softtrace.edge_importance(model, ids)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def cost(rounds: int) -> dict[str, Any]:
    """Training steps of 16 x 128 with and without the default penalty, turn by turn."""
    torch.set_num_threads(2)
    model = load_model(MODEL).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    penalty = softtrace.DensityLoss(model)
    ids = text_blocks(128, 16)

    options = penalty.options.on(model.device)

    def step(with_penalty: bool) -> None:
        with penalty.watching() if with_penalty else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        if with_penalty:
            loss = loss + penalty(ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def period(with_penalty: bool) -> float:
        """Seconds of a step, over as many as lie between two masked runs."""
        steps = options.every
        return seconds(lambda: [step(with_penalty) for _ in range(steps)]) / steps

    period(True)
    pairs = [(period(False), period(True)) for _ in tqdm(range(rounds), desc="cost")]
    return {
        "batch": list(ids.shape),
        "share": options.share,
        "crop": options.crop,
        "every": options.every,
        "threads": 2,
        "plain_seconds": spread([plain for plain, _ in pairs]),
        "penalty_seconds": spread([full for _, full in pairs]),
        "ratio": spread([full / plain for plain, full in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--positions", type=int, default=24, help="blocks for the precision")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "tracing.json")
    args = parser.parse_args()
    if args.peak_of:
        print(peak_of(args.peak_of))
        return
    model = load_model(MODEL)
    result: dict[str, Any] = {**provenance(torch.device("cpu")), "model": MODEL.name}
    for name, part in (
        ("speed", lambda: speed(model, args.rounds)),
        ("memory", memory),
        ("cost", lambda: cost(args.rounds)),
        ("precision", lambda: precision(model, args.positions)),
    ):
        print(f"{name} ...", flush=True)
        result[name] = part()
        print(result[name], flush=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
