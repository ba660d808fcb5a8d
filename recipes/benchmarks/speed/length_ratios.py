"""Ratios that long texts are judged by; a part of :mod:`recipes.benchmarks.speed.lengths`.

What a position costs beside the literal method, evaluation beside its own masked runs, and training
steps beside plain ones with the model's own fused attention.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import softtrace
from recipes.benchmarks.speed.evaluation_parts import Parts, parts_timed
from recipes.benchmarks.speed.steps import Way
from recipes.benchmarks.speed.timing import seconds, settle
from softtrace.density.curve import SIZES
from softtrace.evaluation.decode_race import quartiles
from softtrace.evaluation.measure import measure
from softtrace.graph.edges import EdgeImportance
from softtrace.graph.masks import hard_masks
from softtrace.graph.reach import traces_of

LITERAL = (4, 512)
EVALUATED = (8, 1024)
TRAINED = 2048

#: way to train -> options of the term; None leaves it out
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "whole rows": {"crop": None},
}


def random_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """Tokens of a model, always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(40_000, model.config.vocab_size), (rows, length), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def literal(model: nn.Module, batch: tuple[int, int] = LITERAL, edges: int = 400_000) -> Any:
    """Seconds for each position: a curve of all positions, and the method as it is written.

    That is for one position the best-first search, edge by edge, and a masked run for each of 26
    sizes, of one sequence. The graph of a position has so many edges that a search of all of them
    takes hours. So it is stopped: ``at_least`` counts what it took until then, ``extrapolated`` as
    much time for every other edge, though a longer queue is a slower one. Importances, which the
    literal method makes of a vector for every edge, are given to it.
    """
    ids = random_ids(model, *batch)
    ours = min(seconds(lambda: softtrace.density_curve(model, ids)) for _ in range(3)) / ids.numel()
    instrument = softtrace.attach(model)
    recording = instrument.record(instrument.batch(ids[:1]))
    importance = recording.importance
    on_cpu = EdgeImportance(
        tuple(layer.map(Tensor.cpu) for layer in importance.layers),
        tuple(seen.cpu() for seen in importance.visible),
        importance.valid.cpu(),
    )
    row = torch.zeros(1, dtype=torch.int64, device=ids.device)

    def masked_runs(position: int) -> None:
        for tau in torch.logspace(-1, -5, len(SIZES)).tolist():
            masks = traces_of(hard_masks(importance, tau), row, row + position)
            instrument.masked_logits(recording.batch, masks, recording.attention)

    found = []
    for position in (batch[1] // 4, batch[1] // 2, batch[1] - 1):
        masked_runs(position)
        runs = min(seconds(lambda: masked_runs(position)) for _ in range(2))  # noqa: B023
        total = softtrace.extract_trace(on_cpu, position=position, size=1).total
        began = time.perf_counter()
        softtrace.extract_trace(on_cpu, position=position, size=min(edges, total))
        search = time.perf_counter() - began
        found.append({
            "position": position, "edges": total, "searched": min(edges, total),
            "search": search, "masked_runs": runs, "at_least": search + runs,
            "extrapolated": search * max(1, total / edges) + runs,
        })  # fmt: skip
    return {
        "batch": list(batch),
        "seconds_per_position": ours,
        "literal": found,
        "times_at_least": min(each["at_least"] for each in found) / ours,
        "times_extrapolated": statistics.mean(each["extrapolated"] for each in found) / ours,
    }


def beside_masked(whole: float, parts: Parts) -> dict[str, Any]:
    """Seconds of a measurement's masked runs, and its own and its parts' over those."""
    return {
        "masked_runs": parts.masked_runs,
        "masked_seconds": parts.masked,
        "over_masked_runs": whole / parts.masked,
        "parts": parts.over_masked(whole),
    }


def evaluated(model: nn.Module, batch: tuple[int, int] = EVALUATED) -> Any:
    """Seconds of what ``softtrace evaluate`` measures, over those of its masked runs alone.

    A masked run is the forward under masks, and the logits of what is explained. And over as many
    plain forwards of the model with its own attention, of the same batches.
    """
    blocks = random_ids(model, *batch)

    def measured(extra: int) -> None:
        measure(
            model, blocks, min_context=batch[1] // 2, batch_size=batch[0], extra_blocks=extra,
            progress=lambda runs: None,
        )  # fmt: skip

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=blocks, use_cache=False, logits_to_keep=1)

    forward()
    plain = min(seconds(forward) for _ in range(3))
    found: dict[str, Any] = {"batch": list(batch), "forward": plain}
    measured(0)
    for name, extra in (("curves", 0), ("curves and baselines", batch[0])):
        with parts_timed() as parts:
            whole = seconds(lambda: measured(extra))  # noqa: B023
        found[name] = {
            "seconds": whole,
            **beside_masked(whole, parts),
            "over_forwards": whole / (plain * (parts.masked_runs + 1)),
        }
    return found


class _Attending(TorchDispatchMode):
    """Notes by which of torch's operators attention is computed inside: each is one kernel.

    Attributes:
        names: of the operators. None where scores, softmax and products are operators each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "attention" in func.name():
            self.names.add(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def trained(
    sizes_of: tuple[str, dict[str, Any]], batch: tuple[int, int], device: str, allowed: float
) -> Any:
    """Training steps over a plain one, in periods of eight steps that take turns.

    Args:
        sizes_of: the model's, see :class:`recipes.benchmarks.speed.steps.Way`.
        batch: rows and tokens of a row.
        device: "cuda" or "cpu".
        allowed: seconds for all turns; at least two are taken.
    """
    ways = {name: Way(sizes_of, options, False, batch, device) for name, options in WAYS.items()}
    for way in ways.values():
        for _ in range(3 if device == "cuda" else 1):  # until captured terms have their graph
            way.period()
    with _Attending() as attending:  # which of its kernels sdpa attention has chosen
        ways["plain"].step()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    settle()
    began = time.perf_counter()
    while len(taken["plain"]) < 2 or time.perf_counter() - began < allowed:
        for name, way in ways.items():
            way.step()  # in training a step follows one of the same model
            taken[name].append(way.period())
    return {
        "batch": list(batch),
        "precision": "bfloat16 autocast, AdamW",
        "attention of plain": sorted(attending.names),
        "turns": len(taken["plain"]),
        "options": {name: options for name, options in WAYS.items() if options is not None},
        **{
            name: {
                "seconds": quartiles(values),
                "over_plain": quartiles(
                    [own / plain for own, plain in zip(values, taken["plain"], strict=True)]
                ),
            }
            for name, values in taken.items()
        },
    }
