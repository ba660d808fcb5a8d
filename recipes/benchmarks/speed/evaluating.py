"""How fast ``softtrace evaluate`` is, what share of a limit that is, and where the time goes.

    python -m recipes.benchmarks.speed.evaluating                   # on the shipped model
    python -m recipes.benchmarks.speed.evaluating --model DIR --blocks 1 --block_size 512 \
        --batch_size 1 --extra_blocks 0 --rounds 5 --out FILE       # on one of SmolLM2's size

A measurement runs the model once to record importances, once masked for each threshold of the curve
(11), and on the first ``extra_blocks`` blocks once for each threshold (14) of four baselines. No
implementation that runs the model so often can be faster than those runs are when nothing is
masked, recorded or compared. So the limit is

    plain forwards of the same batches  x  (recording + masked runs)

where a plain forward is the model's own (``use_cache=False``, all logits, no gradients), timed
beside it. ``share`` is the limit's time over ours: 1 would mean that masks, sizes, importances,
distances and exits cost nothing (or less: masked runs leave out the MLPs of tokens that are not
kept). ``share_of_26_masked`` takes 26 masked runs and one recording as the limit instead, one for
each size that is reported; curves are read between fewer runs, so it may pass 1.

``over_masked_runs`` is our time over that of the masked runs in it (forwards under masks, and the
logits of what is explained), ``parts`` what everything else takes in the same unit, as medians:
``recording`` is one more run and all importances, ``exits`` as many readings of the vocabulary as
there are layers but one, as far as they are in doubt.

In turn, so that what else the machine does meets all alike: plain forwards; ``measure`` without
extras; ``measure`` with the default extras; the whole command (text, loading, attaching, summary
and plots). Without extra blocks the last two are left out. Medians and extremes over the rounds,
after one round that does not count. On a CPU seconds are those in which a thread ran (of all, over
their number), so that neighbours prolong them less; ``load`` says how many wanted to. Tokens are
those that are explained; blocks hold about twice as many.

Writes ``results/evaluating.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from recipes.benchmarks.places import MODEL, RESULTS
from recipes.benchmarks.speed.evaluation_parts import PARTS, Parts, parts_timed
from recipes.benchmarks.speed.timing import processor_clock, seconds, spread
from softtrace.cli.evaluate import evaluate
from softtrace.data.blocks import stream_evenly
from softtrace.data.text_source import TextSource
from softtrace.density.baselines import baseline_thresholds
from softtrace.density.curve import SIZES, default_thresholds
from softtrace.evaluation.measure import measure
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.devices import device_of_module
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.percent import percent

TEXT = Path(matplotlib.__file__).parent  # which the model never saw
HELD_OUT = 0.1
BASELINES = 4


@torch.no_grad()
def plain(model: nn.Module, blocks: Tensor, batch_size: int) -> None:
    """The model's own forward over all batches."""
    for ids in torch.split(blocks, batch_size):
        model(input_ids=ids.to(device_of_module(model)), use_cache=False)


def runs(blocks: int, extra_blocks: int, masked: int) -> float:
    """Runs of the model for each block: recording, masked runs, baselines of some blocks."""
    extra = min(extra_blocks, blocks) / blocks
    return 1 + masked + extra * BASELINES * len(baseline_thresholds())


def benchmark(
    folder: Path, rounds: int, count: int, block_size: int, batch_size: int, extra_blocks: int
) -> dict[str, Any]:
    """Times of all, in turn, and what follows from them."""
    source = TextSource(str(TEXT), HELD_OUT, suffixes=(".py",))
    blocks, _ = stream_evenly(source.stream(), load_tokenizer(folder), block_size, count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder).to(device).eval()
    clock = processor_clock(device)
    context = block_size // 2
    tokens = len(blocks) * (block_size - 1 - context)

    def measured(extra: int) -> None:
        measure(
            model, blocks, min_context=context, batch_size=batch_size, extra_blocks=extra,
            progress=lambda blocks: None,
        )  # fmt: skip

    def command() -> None:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            evaluate(
                str(folder), source, f"{out}/density", block_size=block_size, blocks=count,
                batch_size=batch_size, extra_blocks=extra_blocks,
            )  # fmt: skip

    ways = {
        "plain_forward": lambda: plain(model, blocks, batch_size),
        "measure": lambda: measured(0),
        "measure_with_extras": lambda: measured(extra_blocks),
        "whole_command": command,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    parts: dict[str, list[Parts]] = {name: [] for name in ways}
    if not extra_blocks:
        del ways["measure_with_extras"], ways["whole_command"]
    for turn in range(rounds + 1):
        for name, way in ways.items():
            with parts_timed(clock) as own:
                taken = seconds(way, clock)
            if turn:
                found[name].append(taken)
                parts[name].append(own)
    results: dict[str, Any] = {"plain_forward": {"seconds": spread(found["plain_forward"])}}
    masked = len(default_thresholds())
    for name in list(ways)[1:]:
        extra = 0 if name == "measure" else extra_blocks
        pairs = list(zip(found["plain_forward"], found[name], strict=True))
        timed = list(zip(found[name], parts[name], strict=True))
        results[name] = {
            "seconds": spread(found[name]),
            "tokens_per_second": spread([tokens / taken for taken in found[name]]),
            "runs_per_block": runs(len(blocks), extra, masked),
            "over_masked_runs": spread([own / each.masked for own, each in timed]),
            "parts": {
                part: statistics.median(each.over_masked(own)[part] for own, each in timed)
                for part in (*PARTS, "rest")
            },
            "share": spread([own * runs(len(blocks), extra, masked) / all_ for own, all_ in pairs]),
            "share_of_26_masked": spread(
                [own * runs(len(blocks), extra, len(SIZES)) / all_ for own, all_ in pairs]
            ),
        }
    return {
        "model": folder.name,
        "blocks": len(blocks),
        "block_size": block_size,
        "batch_size": batch_size,
        "extra_blocks": extra_blocks,
        "explained_tokens": tokens,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        **results,
        **provenance(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of softtrace evaluate.")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of another model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--extra_blocks", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluating.json")
    given = parser.parse_args()
    result = benchmark(
        given.model, given.rounds, given.blocks, given.block_size, given.batch_size,
        given.extra_blocks,
    )  # fmt: skip
    write_json(given.out, result)
    for name in ("measure", "measure_with_extras", "whole_command"):
        if (row := result.get(name)) is None:
            continue
        print(
            f"{name}: {row['tokens_per_second']['median']:.0f} explained tokens/s "
            f"({row['tokens_per_second']['min']:.0f} to {row['tokens_per_second']['max']:.0f}), "
            f"{percent(row['share']['median'], 0)} of the limit of {row['runs_per_block']:g} plain "
            f"forwards, {row['over_masked_runs']['median']:.2f} times its masked runs"
        )
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
