"""What a training step keeps a GPU busy with, and the processor that gives it work.

    python -m recipes.benchmarks.speed.step_profile                # about six minutes on one GPU
    python -m recipes.benchmarks.speed.step_profile --models SmolLM2-135M --ways plain balanced

Steps of ``steps.py`` under torch's profiler. For each way: milliseconds a step in which the GPU
works, by the part of the step that gave it the work, and those of the processor in each part, which
the profiler makes slower. A step whose two sums are near each other leaves the GPU waiting. Writes
``results/step_profile.json``.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import gc
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed import steps
from softtrace import DensityLoss
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.loss import density_loss

STEPS = 4
#: part of a step -> who runs it; parts inside of others count there
PARTS: dict[str, tuple[Any, str]] = {
    "backward": (torch.Tensor, "backward"),
    "optimiser": (torch.optim.AdamW, "step"),
    "term": (DensityLoss, "__call__"),
    "exits": (DensityLoss, "_exits"),
    "draw of exits": (density_loss, "draw_exits"),
    "masked runs": (DensityLoss, "_density"),
}
_MARK = "part: "
GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Each part of a step has its name in the profile."""

    def within(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + name):
                return run(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            run = within(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, run))
        yield


def summary(events: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Milliseconds a step of a profile.

    Args:
        events: of the Chrome trace.
        count: steps in it.
    """
    spans = [each for each in events if each.get("ph", "X") == "X" and "dur" in each]
    parts = [
        (each["ts"], each["ts"] + each["dur"], each["name"].removeprefix(_MARK))
        for each in spans
        if each["cat"] == "user_annotation" and each["name"].startswith(_MARK)
    ]
    parts.sort()
    launched = {
        each["args"]["correlation"]: each["ts"]
        for each in spans
        if each["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in each.get("args", {})
    }
    begins = [begin for begin, _, _ in parts]

    def part_of(moment: float | None) -> str:
        """The innermost part that a moment of the processor lies in."""
        if moment is None:
            return "the forward and what was compiled"
        for begin, end, name in reversed(parts[: bisect.bisect_right(begins, moment)]):
            if begin <= moment <= end:
                return name
        return "the forward and what was compiled"

    worked: Counter[str] = Counter()
    busy, until = 0.0, 0.0
    kernels = sorted((e for e in spans if e["cat"] in GPU), key=lambda each: each["ts"])
    for each in kernels:
        worked[part_of(launched.get(each["args"]["correlation"]))] += each["dur"]
        begin, end = max(until, each["ts"]), each["ts"] + each["dur"]
        busy, until = busy + max(0.0, end - begin), max(until, end)
    cpu: Counter[str] = Counter()
    for begin, end, name in parts:
        cpu[name] += end - begin

    def a_step(found: Counter[str]) -> dict[str, float]:
        return {name: round(value / 1e3 / count, 2) for name, value in found.most_common()}

    return {
        "GPU works": round(busy / 1e3 / count, 2), "GPU, by part": a_step(worked),
        "processor, by part": a_step(cpu), "kernels": len(kernels) / count,
    }  # fmt: skip


def profiled(name: str, way: str, compiled: bool) -> dict[str, Any]:
    """One way to train: undisturbed, then under the profiler."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    trained = steps.Way(steps.MODELS[name], steps.WAYS[way], compiled)
    for _ in range(3):
        trained.period()
    took = [trained.period() for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    trained.period()
    memory = {
        kind: round(torch.cuda.memory_stats()[f"{kind}_bytes.all.peak"] / 2**30, 2)
        for kind in ("allocated", "reserved")
    }
    with marked(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            trained.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {
        "step, not profiled": [round(1e3 * each, 1) for each in took],
        "peak memory, GiB": memory,
        **summary(events, STEPS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["Gemma-3-270M"], choices=list(steps.MODELS))
    parser.add_argument("--ways", nargs="+", default=["plain", "balanced"],
                        choices=list(steps.WAYS))  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "step_profile.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for way in args.ways:
            for kind in ("eager", "compiled"):
                row = {"model": name, "kind": kind, "way": way}
                rows.append(row | profiled(name, way, kind == "compiled"))
                print(json.dumps(rows[-1], indent=1), flush=True)
                found = {"unit": "milliseconds a step", "steps": STEPS, "rows": rows}
                write_json(args.out, {**found, **provenance(torch.device("cuda"))})


if __name__ == "__main__":
    main()
