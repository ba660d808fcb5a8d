"""At which thresholds a curve is measured: chosen on real models, and how far readings are off.

    python -m recipes.benchmarks.correctness.thresholds   # how far off they are
    python -m recipes.benchmarks.correctness.thresholds --choose  # prints better ones

From what ``python -m recipes.benchmarks.comparison.sensitivity measure`` left in RUNS: curves of
both pretrained models on three texts at three lengths, of SmolLM2 after a short fine-tuning without
and with the penalty, with recorded and recomputed attention, and from curves of the shipped model,
made here; each at 75 thresholds, which here are the truth. Coordinate descent moves one threshold
at a time to where the readings of all of them together come nearest. Writes
``results/thresholds.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recipes.benchmarks.comparison.sensitivity import BLOCKS, DENSE, MODELS, RUNS, TEXTS
from recipes.benchmarks.places import MODEL, RESULTS
from recipes.benchmarks.speed.tracing import text_blocks
from softtrace.density.curve import SIZES, DensityCurve, default_thresholds
from softtrace.density.sweep import density_curve
from softtrace.evaluation.provenance import provenance
from softtrace.files import write_json
from softtrace.model.loading import load_model
from softtrace.tracing.masking import AttentionKind

KINDS: tuple[AttentionKind, ...] = ("recorded", "recomputed")
BEFORE = (0.448, 0.343, 0.161, 0.0987, 0.0723, 0.0484, 0.0388, 0.0284, 0.019, 0.0102, 0.0046)
"""The default thresholds until 2026-11-27, which were chosen on the shipped model alone."""

_SIZE_WEIGHT = 0.1  # of an error of a power of ten in the size at TV 0.2, against one in TV


def curves(tokens: int | None = None) -> dict[tuple[str, str, int, str], DensityCurve]:
    """Curves ``[75, 1, n]`` by model, text, length and attention; of the first tokens, if told."""
    found = {}
    measured = list(itertools.product(MODELS, TEXTS, BLOCKS))
    measured += [(f"{MODELS[0]} {way}", "prose", 256) for way in ("plain", "penalty")]
    for (model, text, length), kind in itertools.product(measured, KINDS):
        held = load_file(RUNS / f"{model} {text} {length}.safetensors")
        size, variation, edges = (
            held[f"dense {kind} {name}"][..., :tokens] for name in ("size", "variation", "edges")
        )
        found[model, text, length, kind] = DensityCurve(
            torch.tensor(DENSE), size[:, None], variation[:, None], edges.long()[None],
            torch.zeros_like(edges)[None],
        )  # fmt: skip
    for kind in KINDS:
        found[MODEL.name, "python", 64, kind] = shipped(kind, tokens or 256)
    return found


@functools.cache
def shipped(kind: AttentionKind, tokens: int) -> DensityCurve:
    """The shipped model's curve on Python source that it never saw, ``[75, 1, n]``."""
    ids = text_blocks(64, 8)
    explained = torch.zeros_like(ids, dtype=torch.bool)
    explained[:, 32:-1] = True
    with torch.no_grad():
        curve = density_curve(load_model(MODEL).eval(), ids, thresholds=DENSE, attention=kind)
    size, variation = (each[:, explained][:, None, :tokens] for each in (
        curve.size, curve.total_variation
    ))  # fmt: skip
    edges = curve.edges[explained][None, :tokens]
    return DensityCurve(
        curve.thresholds.float(), size.float(), variation.float(), edges, torch.zeros_like(edges)
    )


def nearest(thresholds: tuple[float, ...]) -> list[int]:
    """Their places among the 75, by the logarithm."""
    grid = torch.tensor(DENSE).log()
    wanted = torch.tensor(thresholds).log()
    return (grid[None] - wanted[:, None]).abs().argmin(1).unique().tolist()


def errors(curve: DensityCurve, places: list[int]) -> dict[str, Tensor]:
    """Of readings from some thresholds: of TV ``[26, n]``, of the area and of log10 of the size."""
    read = replace(
        curve, thresholds=curve.thresholds[places], size=curve.size[places],
        total_variation=curve.total_variation[places],
    )  # fmt: skip
    return {
        "tv": (read.at_sizes() - curve.at_sizes())[:, 0],
        "area": (read.area() - curve.area())[0],
        "size": (read.size_at().clamp_min(1e-9) / curve.size_at().clamp_min(1e-9)).log10()[0],
    }


def cost(every: list[DensityCurve], places: list[int]) -> float:
    """Mean over the curves, so that each model, text and length counts the same."""
    found = [errors(curve, places) for curve in every]
    return sum(
        float(each["tv"].abs().mean() + _SIZE_WEIGHT * each["size"].abs().mean()) for each in found
    ) / len(found)


def choose(count: int) -> list[int]:
    """Coordinate descent over places among the 75, from evenly spaced ones."""
    every = list(curves(48).values())
    places = torch.linspace(8, len(DENSE) - 12, count).round().long().tolist()
    best, moved = cost(every, places), True
    while moved:
        moved = False
        for at in range(count):
            low = places[at - 1] + 1 if at else 0
            high = places[at + 1] if at + 1 < count else len(DENSE)
            for place in range(low, high):
                tried = [*places[:at], place, *places[at + 1 :]]
                if (value := cost(every, tried)) < best - 1e-6:
                    best, places, moved = value, tried, True
        print(f"{best:.5f}", [float(f"{DENSE[place]:.3g}") for place in places], flush=True)
    return places


def report(thresholds: tuple[float, ...]) -> dict[str, Any]:
    """How far readings from some thresholds are off, on each model."""
    found: dict[str, Any] = {}
    for (model, _, length, kind), curve in curves().items():
        found.setdefault(f"{model}, {length} tokens, {kind}", []).append(
            errors(curve, nearest(thresholds))
        )
    return {name: _summary(rows) for name, rows in found.items()}


def _summary(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    tv, area, size = (torch.cat([row[key] for row in rows], -1) for key in ("tv", "area", "size"))
    return {
        "tv_mean_absolute": float(tv.abs().mean()),
        "tv_mean_at_worst_size": float(tv.mean(1).abs().max()),
        "tv_largest": float(tv.abs().max()),
        "area_mean": float(area.mean()),
        "median_size_ratio": float(10 ** size.median()),
        "tokens": tv.shape[1],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", type=int, nargs="?", const=11, metavar="COUNT")
    args = parser.parse_args()
    if args.choose:
        choose(args.choose)
    else:
        found = {
            "sizes": list(SIZES),
            "errors": report(default_thresholds()),
            "errors_before": report(BEFORE),
            **provenance(torch.device("cpu")),
        }
        write_json(RESULTS / "thresholds.json", found)
        for key, row in found["errors"].items():
            print(key, {name: round(value, 4) for name, value in row.items()})
