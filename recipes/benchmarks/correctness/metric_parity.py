"""Whether every metric computes the same however its data come: processes, batches, padding.

    python -m recipes.benchmarks.correctness.metric_parity

The shipped model reads sequences of different lengths. What one process computes of one batch is
compared with what batches of other sizes, padding on the left or the right, each sequence alone,
and two and three processes with unequal shares compute (one of three has no data). Writes
``results/metric_parity.json``: the largest difference of any number of each metric.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torchmetrics import MetricCollection
from tqdm import tqdm

from recipes.benchmarks.places import MODEL, RESULTS
from recipes.benchmarks.speed.tracing import text_blocks
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.metrics import METRICS, readings
from softtrace.model.loading import load_model
from tests.support.numbers import flat

LENGTH, SEQUENCES = 40, 24
Batch = tuple[Tensor, Tensor]


def lengths() -> list[int]:
    """Real tokens of each sequence, 20 to 40."""
    return [LENGTH - 5 * (number % 5) for number in range(SEQUENCES)]


def batches(blocks: Tensor, size: int, side: str = "right") -> list[Batch]:
    """Ids and attention masks, the shorter sequences padded on one side."""
    found = []
    for first in range(0, len(blocks), size):
        rows = range(first, min(first + size, len(blocks)))
        longest = max(lengths()[row] for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            count = lengths()[row]
            at = slice(longest - count, longest) if side == "left" else slice(0, count)
            ids[place, at], mask[place, at] = blocks[row, :count], 1
        found.append((ids, mask))
    return found


def computed(model: Any, given: list[Batch], title: str) -> dict[str, Tensor]:
    """Every number of each metric, flat."""
    metrics = MetricCollection([each() for each in METRICS])
    for ids, mask in tqdm(given, desc=title, leave=False):
        metrics.update(**readings(model, ids, mask, min_context=8, nucleus=True))
    return {name: flat(metric.compute()) for name, metric in metrics.items()}


def as_process(rank: int, world: int, folder: str, blocks: Tensor, dtype: str) -> None:
    """One process of several, which leaves what it computed in the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    given = batches(blocks, 3)
    cut = len(given) // 3
    shares = {2: (given[:cut], given[cut:]), 3: (given[: 2 * cut], [], given[2 * cut :])}
    found = computed(load_model(MODEL, dtype="float32").to(getattr(torch, dtype)).eval(),
                     shares[world][rank], f"process {rank} of {world}")  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def over_processes(world: int, blocks: Tensor, dtype: str) -> list[dict[str, Tensor]]:
    """What each of several processes computes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(as_process, (world, folder, blocks, dtype), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def largest(wanted: dict[str, Tensor], others: list[dict[str, Tensor]]) -> dict[str, float]:
    """Largest absolute difference of any number of a metric; NaN has to meet NaN."""
    found = {}
    for name, values in wanted.items():
        gaps = [torch.where(values.isnan() & o[name].isnan(), 0, o[name] - values) for o in others]
        found[name] = float(torch.stack(gaps).abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--out", type=Path, default=RESULTS / "metric_parity.json")
    args = parser.parse_args()
    blocks = text_blocks(LENGTH, SEQUENCES)
    differences: dict[str, Any] = {}
    for dtype in args.dtypes:
        model = load_model(MODEL, dtype="float32").to(getattr(torch, dtype)).eval()
        wanted = computed(model, batches(blocks, SEQUENCES), f"{dtype}, one batch")
        ways = {
            "batches of 1, no padding": [batches(blocks, 1)],
            "batches of 5": [batches(blocks, 5)],
            "padding on the left": [batches(blocks, SEQUENCES, "left")],
            "batches of 5, padding on the left": [batches(blocks, 5, "left")],
        }
        differences[dtype] = {
            way: largest(wanted, [computed(model, given, f"{dtype}, {way}") for given in several])
            for way, several in ways.items()
        }
        for world in (2, 3):
            found = over_processes(world, blocks, dtype)
            differences[dtype][f"{world} processes"] = largest(wanted, found)
    result = {
        "sequences": SEQUENCES,
        "tokens": sum(lengths()),
        "largest_difference": differences,
        **provenance(torch.device("cpu")),
    }
    write_json(args.out, result)
    for dtype, each in differences.items():
        for way, of in each.items():
            print(f"{dtype:8} {way:34}", *(f"{name} {gap:.1e}" for name, gap in of.items()))


if __name__ == "__main__":
    main()
