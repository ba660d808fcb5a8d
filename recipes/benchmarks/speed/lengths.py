"""Memory and time of importances, traces, curves and training steps, as sequences grow.

    python -m recipes.benchmarks.speed.lengths                   # all of it, on a GPU if there is
    python -m recipes.benchmarks.speed.lengths --lengths 512 2048 --models SmolLM2-135M
    python -m recipes.benchmarks.speed.lengths --only curve literal    # rows whose names have these
    python -m recipes.benchmarks.speed.lengths --weights DIR     # SmolLM2's own weights
    python -m recipes.benchmarks.speed.lengths --device cpu --models tiny --lengths 64

Models have random weights at the sizes that their cards state, unless ``--weights`` names a folder
for SmolLM2-135M; nothing is downloaded. Most rows are of one sequence, in bfloat16 on a GPU and
float32 on a CPU: seconds (the best of up to three calls), the most bytes of tensors alive beyond
what was held before, and what the result holds; of a curve also the seconds of its masked runs
alone, and the whole call's over those. Others, at one length, are ratios:
:mod:`recipes.benchmarks.speed.length_ratios`. Every row says when and with what it was made.

A row that takes longer than ``--limit`` is given up, and one that runs out of memory says so; both
are results. Rows that are there already, of the same device, are not measured again. Results are
written after every row, to ``results/lengths.json`` and, as growth with the length,
``results/lengths.png``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import softtrace
from recipes.benchmarks.places import RESULTS
from recipes.benchmarks.speed import length_ratios
from recipes.benchmarks.speed.evaluation_parts import parts_timed
from recipes.benchmarks.speed.length_ratios import random_ids
from recipes.benchmarks.speed.outcome import outcome
from recipes.benchmarks.speed.peak import Peak, held_bytes
from recipes.benchmarks.speed.steps import MODELS as OF_CARDS
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json

LENGTHS = (512, 2048, 8192, 32_768)
POSITIONS = range(-64, 0)
TRAINED = 2048  # longer training windows are not promised
LONGEST = {"curve of all, recorded": 8192}  # all positions cost the cube of the length
ENOUGH = 10.0  # seconds after which a call is not repeated
IN_TURN = 40.0  # seconds that ways to train take turns

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 500}  # fmt: skip
MODELS = {
    "tiny": ("Llama", TINY),
    **{name: OF_CARDS[name] for name in ("SmolLM2-135M", "Llama-3.2-1B")},
}


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
    """Forward and backward of eight sequences (one on a CPU) with the model's own attention."""
    rows = _trained(ids)
    _backward(model, model(input_ids=rows, labels=rows).loss)


def masked_step(model: nn.Module, ids: Tensor) -> Any:
    """The same and the term at a step with masked runs, of one window, which is a whole row."""
    rows = _trained(ids)
    density = softtrace.DensityLoss(
        model, crop=None, every=1, share=1 / len(rows), exits=0, cuda_graph=False
    )
    loss = model(input_ids=rows, labels=rows).loss
    _backward(model, loss + density(rows).loss)


def _trained(ids: Tensor) -> Tensor:
    return ids.expand(8 if ids.is_cuda else 1, -1)


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
RATIOS = {
    "evaluate": length_ratios.EVALUATED,
    "literal": length_ratios.LITERAL,
    "training": (8, TRAINED),
}
"""What is measured once for each model, and the batch ``[B, T]`` that it is measured on."""
SMALL = (2, 64)  # in place of those, for the tiny model
ONLY_OF = {"literal": ("tiny", "Llama-3.2-1B")}


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


def measured(model: nn.Module, ids: Tensor, what: str, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of one of :data:`MEASURED`, and what masked runs take of a curve's.

    These are forwards under masks, and the logits of what is measured, of the fastest call.
    """
    seconds: list[float] = []
    peaks, held, masked = [], 0, {}
    timed = parts_timed if "curve" in what else nullcontext
    while not seconds or (len(seconds) < 3 and sum(seconds) < ENOUGH):
        found = None
        with torch.set_grad_enabled(what in STEPS), timed() as parts, Peak(device) as peak:
            found = MEASURED[what](model, ids)
        seconds.append(peak.seconds)
        peaks.append(peak.gib)
        held = held_bytes(found)
        if parts is not None and peak.seconds == min(seconds):
            masked = length_ratios.beside_masked(peak.seconds, parts)
    return {
        "seconds": round(min(seconds), 4),
        "peak_gib": round(max(peaks), 6),
        "held_gib": round(held / 2**30, 6),
        **masked,
    }


def ratio(model: nn.Module | None, name: str, what: str, device: torch.device) -> Any:
    """One of :data:`RATIOS`."""
    batch = SMALL if name == "tiny" else RATIOS[what]
    if what == "training":
        rows = batch[0] // 2 if name == "Llama-3.2-1B" else batch[0]
        batch = (rows if device.type == "cuda" else 1, batch[1])
        return length_ratios.trained(MODELS[name], batch, device.type, IN_TURN)
    assert model is not None
    if what == "evaluate":
        return length_ratios.evaluated(model, batch)
    return length_ratios.literal(model, batch)


def over_forward(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """A row's peak, less what the result holds, over that of the model's own forward."""
    same = ("model", "device", "length")
    own = [each for each in rows if each["what"] == "forward" and "peak_gib" in each]
    own = [each for each in own if all(each[key] == row[key] for key in same)]
    if not own or "peak_gib" not in row:
        return None
    return float((row["peak_gib"] - row["held_gib"]) / own[0]["peak_gib"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory, seconds, and memory over a forward's, by the length; a column a model and device."""
    from matplotlib.figure import Figure

    drawn: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "peak memory beyond the weights, GiB": lambda row: row.get("peak_gib"),
        "seconds": lambda row: row.get("seconds"),
        "peak less result, over a forward's": lambda row: over_forward(row, rows),
    }
    columns = sorted({(row["model"], row["device"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(columns), 10), layout="constrained")
    axes = figure.subplots(len(drawn), len(columns), squeeze=False, sharex=True)
    for (model, device), column in zip(columns, axes.T, strict=True):
        own = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        for (unit, number), plotted in zip(drawn.items(), column, strict=True):
            for place, what in enumerate(MEASURED):  # the same colour in every panel
                found = [(row["length"], number(row)) for row in own if row["what"] == what]
                points = sorted((at, value) for at, value in found if value)
                if points:
                    plotted.plot(
                        *zip(*points, strict=True), marker="o", color=f"C{place}", label=what
                    )
            plotted.set(xscale="log", yscale="log", ylabel=unit)
        column[0].set_title(f"{model}, {device}", fontsize=9)
        column[-1].set_xlabel("tokens of the sequence")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M", "Llama-3.2-1B"],
                        choices=sorted(MODELS), help="sizes of the models")  # fmt: skip
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART",
                        help="rows with one of these in their names, which are: "
                        f"{', '.join([*MEASURED, *RATIOS])}")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for a row")
    parser.add_argument("--weights", help="folder of SmolLM2-135M's own weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cuda or cpu")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths.json", help="result file")
    return parser.parse_args()


def wanted(options: argparse.Namespace, name: str) -> list[tuple[int, str]]:
    """Lengths and names of the rows of a model, short ones first."""
    found = [
        (length, what)
        for length in options.lengths
        for what in MEASURED
        if length <= LONGEST.get(what, TRAINED if what in STEPS else length)
    ]
    for what, (_, length) in RATIOS.items():
        if name in ONLY_OF.get(what, MODELS):
            found.append((SMALL[1] if name == "tiny" else length, what))
    found.sort(key=lambda row: row[0])
    return [row for row in found if any(part in row[1] for part in options.only)]


def row_of(
    what: str, length: int, name: str, model: nn.Module | None, options: argparse.Namespace
) -> dict[str, Any]:
    """What is measured for a row, or why it is not."""
    device = torch.device(options.device)

    def work() -> dict[str, Any]:
        if what in RATIOS:
            return ratio(model, name, what, device)
        assert model is not None
        return measured(model, random_ids(model, 1, length), what, device)

    found = outcome(work, options.limit)
    if model is not None:
        model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """Measure what is missing, and write it after each row."""
    options = parse()
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    keys = ("model", "device", "length", "what")
    for name in options.models:
        model = None
        for length, what in wanted(options, name):
            own = dict(zip(keys, (name, where, length, what), strict=True))
            before = [row for row in rows if all(row[key] == own[key] for key in keys)]
            # Rows without times are of a GPU that others used too.
            if before and not options.again and {"seconds", "batch", "error"} & set(before[0]):
                continue
            if what == "training":  # builds models of its own
                model = None
                gc.collect()
            elif model is None:
                model = build(name, device, options.weights)
                softtrace.attach(model)
            own["weights"] = "own" if options.weights and name == "SmolLM2-135M" else "random"
            own |= row_of(what, length, name, model, options)
            own["load"] = round(os.getloadavg()[0], 1)  # neighbours at work make a CPU slow
            own |= (facts := provenance(device))
            place = rows.index(before[0]) if before else len(rows)
            rows[place : place + 1] = [own]
            print(json.dumps(own), flush=True)
            write_json(options.out, {"rows": rows, **facts})
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
