"""Memory and time of importances, traces, curves and training steps, as sequences grow.

    python -m recipes.benchmarks.speed.lengths                   # all of it, on a GPU if there is
    python -m recipes.benchmarks.speed.lengths --lengths 512 2048 --models SmolLM2-135M
    python -m recipes.benchmarks.speed.lengths --weights DIR     # SmolLM2's own weights

Models have random weights at the sizes that their cards state, unless ``--weights`` names a folder
for SmolLM2-135M; nothing is downloaded. Each measurement is of one sequence, in bfloat16 on a GPU
and float32 on a CPU: seconds (on a GPU the better of two calls), the most bytes of tensors alive
beyond what was held before, and what the result holds. What was measured before on the same device
is not measured again. Results are written after every measurement, to ``results/lengths.json``
and, as growth with the length, ``results/lengths.png``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import softtrace
from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed.steps import MODELS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from tests.support.live_bytes import LiveBytes

LENGTHS = (512, 2048, 8192, 32_768)
POSITIONS = range(-64, 0)
TRAINED = 2048  # longer training windows are not promised


def forward(model: nn.Module, ids: Tensor) -> Any:
    """The model's own, with its fused attention and one logit."""
    return model(input_ids=ids, logits_to_keep=1, use_cache=False).logits


def importance(model: nn.Module, ids: Tensor) -> Any:
    """Of every edge that the last 64 positions need."""
    return softtrace.edge_importance(model, ids, positions=POSITIONS)


def trace(model: nn.Module, ids: Tensor) -> Any:
    """The 1,000 first edges of the last position's trace."""
    found = softtrace.edge_importance(model, ids, positions=[-1])
    return softtrace.extract_trace(found, size=1000)


def curve(model: nn.Module, ids: Tensor, **options: Any) -> Any:
    """Of the last 64 positions, 11 thresholds."""
    return softtrace.density_curve(model, ids, positions=POSITIONS, **options)


def recomputed(model: nn.Module, ids: Tensor) -> Any:
    """The same with recomputed attention."""
    return curve(model, ids, attention="recomputed")


def every_position(model: nn.Module, ids: Tensor) -> Any:
    """Of all positions, 11 thresholds."""
    return softtrace.density_curve(model, ids)


def plain_step(model: nn.Module, ids: Tensor) -> Any:
    """Forward and backward of eight sequences with the model's own attention."""
    _backward(model, model(input_ids=ids.expand(8, -1), labels=ids.expand(8, -1)).loss)


def masked_step(model: nn.Module, ids: Tensor) -> Any:
    """The same and the term at a step with masked runs, of one window, which is a whole row."""
    rows = ids.expand(8, -1)
    density = softtrace.DensityLoss(
        model, crop=None, every=1, share=1 / 8, exits=0, cuda_graph=False
    )
    loss = model(input_ids=rows, labels=rows).loss
    _backward(model, loss + density(rows).loss)


def _backward(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


MEASURED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "forward": forward,
    "importance": importance,
    "trace": trace,
    "curve of 64, recorded": curve,
    "curve of 64, recomputed": recomputed,
    "curve of all, recorded": every_position,
    "plain step": plain_step,
    "step with masked runs": masked_step,
}
STEPS = ("plain step", "step with masked runs")


def build(name: str, device: torch.device, weights: str | None) -> nn.Module:
    """A model on its device, whatever its positions were trained for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if weights and name == "SmolLM2-135M":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=dtype)
        return loaded.to(device).eval()
    stem, sizes = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**sizes, max_position_embeddings=max(LENGTHS))
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{stem}ForCausalLM")(config)
    built: nn.Module = model.to(dtype).eval()
    return built


class Peak:
    """The most bytes of tensors during a call, in GiB, beyond what was held before; seconds."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.live = LiveBytes()

    def __enter__(self) -> Peak:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.live.__enter__()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *how: Any) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - self.before
        else:
            self.live.__exit__(*how)
            peak = self.live.peak
        self.seconds = time.perf_counter() - self.began
        self.gib = peak / 2**30


def held_bytes(found: Any, known: set[int] | None = None) -> int:
    """Bytes of the tensors that a result holds, storages of several once."""
    known = set() if known is None else known
    if id(found) in known:
        return 0
    known.add(id(found))
    if isinstance(found, Tensor):
        storage = found.untyped_storage()
        address = storage.data_ptr()
        if address in known:
            return 0
        known.add(address)
        return storage.nbytes()
    if isinstance(found, tuple | list):
        return sum(held_bytes(each, known) for each in found)
    if hasattr(found, "__dict__"):
        inside = [*vars(found).values()]
        closure = getattr(getattr(found, "function", None), "__closure__", None) or ()
        inside += [cell.cell_contents for cell in closure]
        return sum(held_bytes(each, known) for each in inside)
    return 0


def measured(model: nn.Module, ids: Tensor, what: str, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of one of :data:`MEASURED`, or that memory ran out."""
    seconds, peaks, held = [], [], 0
    try:
        for _ in range(2 if device.type == "cuda" else 1):
            found = None
            with torch.set_grad_enabled(what in STEPS), Peak(device) as peak:
                found = MEASURED[what](model, ids)
            seconds.append(peak.seconds)
            peaks.append(peak.gib)
            held = held_bytes(found)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        return {"error": "out of memory"}
    return {
        "seconds": round(min(seconds), 4),
        "peak_gib": round(max(peaks), 6),
        "held_gib": round(held / 2**30, 6),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Peak memory and seconds over the length, a column for each model and device."""
    from matplotlib.figure import Figure

    columns = sorted({(row["model"], row["device"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(columns), 7), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True)
    for (model, device), column in zip(columns, axes.T, strict=True):
        column[0].set_title(f"{model}, {device}", fontsize=9)
        for key, unit, drawn in zip(
            ("peak_gib", "seconds"), ("peak memory beyond the weights, GiB", "seconds"), column,
            strict=True,
        ):  # fmt: skip
            for what in MEASURED:
                points = sorted(
                    (row["length"], row[key])
                    for row in rows
                    if (row["model"], row["device"], row["what"]) == (model, device, what)
                    and row.get(key, 0) > 0
                )
                if points:
                    drawn.plot(*zip(*points, strict=True), marker="o", label=what)
            drawn.set(xscale="log", yscale="log", ylabel=unit)
        column[1].set_xlabel("tokens of the sequence")
    axes[1, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M", "Llama-3.2-1B"],
                        choices=sorted(MODELS), help="sizes of the models")  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens")
    parser.add_argument("--what", nargs="+", default=list(MEASURED), choices=list(MEASURED),
                        help="what is measured")  # fmt: skip
    parser.add_argument("--weights", help="folder of SmolLM2-135M's own weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cuda or cpu")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths.json", help="result file")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write it after each measurement."""
    options = parse()
    device = torch.device(options.device)
    facts = provenance(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    keys = ("model", "device", "length", "what")
    for name in options.models:
        model = None
        for length in options.lengths:
            for what in options.what:
                own = dict(zip(keys, (name, where, length, what), strict=True))
                known = any(all(row[key] == own[key] for key in keys) for row in rows)
                if known or (what in STEPS and length > TRAINED):
                    continue
                if model is None:
                    model = build(name, device, options.weights)
                    softtrace.attach(model)
                generator = torch.Generator().manual_seed(0)
                ids = torch.randint(1000, 40_000, (1, length), generator=generator).to(device)
                own["weights"] = "own" if options.weights and name == "SmolLM2-135M" else "random"
                own |= measured(model, ids, what, device)
                own["load"] = round(os.getloadavg()[0], 1)  # neighbours at work make a CPU slow
                rows.append(own)
                print(json.dumps(own), flush=True)
                write_json(options.out, {"rows": rows, **facts})
        del model
        gc.collect()
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
