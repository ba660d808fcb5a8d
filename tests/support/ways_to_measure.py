"""Importances, curves and measurements of a model in parts, each process with its own tokens.

Run as a module this is one of the processes: ``FOLDER WAY...``, with the variables of torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from softtrace import DensityCurve, attach, density_curve, edge_importance
from softtrace.density import sweep
from softtrace.errors import InvalidInputError
from softtrace.evaluation.measure import Measurements, measure
from softtrace.evaluation.study.generation import read_generation
from softtrace.evaluation.study.readings import read_model
from softtrace.evaluation.study.unigrams import Unigrams
from softtrace.graph import reach
from softtrace.metrics.readings import readings
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.units import WAYS
from tests.support.ways_to_shard import begin, said_by

BLOCKS = (3, 0)  # of each process
TENSORS = ("size", "total_variation", "edges", "entropy", "nucleus", "readings")


def own_batch(rank: int) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]`` of one process, of a shape of its own."""
    ids = tiny_prompt(6 + rank, seed=rank, batch=3 - rank % 2)
    mask = torch.ones_like(ids)
    mask[0, : 1 + rank] = 0
    return ids, mask


def of_curve(curve: DensityCurve) -> dict[str, Tensor]:
    found = {name: getattr(curve, name) for name in TENSORS}
    return {name: each for name, each in found.items() if each is not None}


def curve(model: nn.Module, rank: int) -> dict[str, Tensor]:
    return of_curve(density_curve(model, *own_batch(rank), nucleus=True))


def one_by_one(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Positions that are run one by one: other numbers of runs on every process."""
    grid, places = (0.3, 0.05), range(-2 - rank, 0)
    options: dict[str, Any] = {"attention": "recomputed", "exact": True, "positions": places}
    return of_curve(density_curve(model, *own_batch(rank), grid, **options))


def importance(model: nn.Module, rank: int) -> list[Tensor]:
    with torch.no_grad():
        of_norms = [edge_importance(model, *own_batch(rank), norm=each) for each in ("l1", "ifr")]
    return [
        each
        for found in of_norms
        for layer in found.layers
        for each in (layer.attention, layer.attention_residual, layer.mlp, layer.mlp_residual)
    ]


def read(model: nn.Module, rank: int) -> dict[str, Any]:
    found = readings(model, *own_batch(rank))
    return {**found, "curve": of_curve(found["curve"])}


def gradient(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Of importances, with what FSDP2 made of all processes' ones."""
    model.zero_grad()
    found = edge_importance(model, *own_batch(rank))
    # Not the first layer's MLP alone: the last one's also reads the final norm.
    torch.stack([layer.mlp.sum() for layer in found.layers]).sum().backward()
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {
        name: each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in grads.items()
    }


def as_lists(found: Measurements) -> dict[str, Any]:
    """What of measurements can be saved, and compared."""
    return {**vars(found), "baselines": {str(key): each for key, each in found.baselines.items()}}


def measured(model: nn.Module, rank: int) -> dict[str, Any]:
    """Of as many blocks as this process has, some with baselines; the second has none."""
    blocks = tiny_prompt(8, seed=3, batch=8)[: BLOCKS[rank]]
    options: dict[str, Any] = {"min_context": 4, "batch_size": 2, "extra_blocks": 1}
    with patch("softtrace.evaluation.measure.baseline_thresholds", lambda: (0.5, 0.9)):  # not 14
        return as_lists(measure(model, blocks, progress=lambda runs: None, **options))


def studied(model: nn.Module, rank: int) -> list[Any]:
    """What the study reads of a text and of its continuations, of as many blocks as the others."""
    blocks = tiny_prompt(8, seed=5 + rank, batch=2)
    own: Any = model.config
    common: dict[str, Any] = {"batch_size": 2, "progress": lambda runs: None}
    found = read_model(
        model, blocks, Unigrams(torch.arange(own.vocab_size), 1.0), first=3,
        ends=torch.tensor([5, 6]), lengths=(3,), **common,
    )  # fmt: skip
    written = read_generation(model, blocks, seed=1, attention="recomputed", **common)
    texts = [[text.ids, vars(text.tokens)] for text in written.values()]
    sums = found.variation, found.composition, found.nucleus, found.unigram
    return [vars(found.whole), *sums, vars(found.windows[3]), *texts]


def wrong_on_one(model: nn.Module, rank: int) -> dict[str, str]:
    """What each process says of a batch, or of logits, that are wrong on the second alone."""
    ids, mask = own_batch(rank)

    def wrong_mask() -> None:
        density_curve(model, ids, mask + mask * rank, (0.1,))

    def wrong_ids() -> None:
        edge_importance(model, ids - rank * 1000)

    def wrong_block() -> None:
        options: dict[str, Any] = {"min_context": 2, "batch_size": 2, "extra_blocks": 0}
        measure(model, ids - rank * 1000, progress=lambda runs: None, **options)

    def wrong_between() -> None:
        """After one of two batches, as where a monitor goes through them."""
        with attach(model).in_turns():
            for number in range(2):
                if rank == number == 1:
                    raise InvalidInputError("broken here")
                readings(model, ids, mask, thresholds=(0.1,))

    return said_by(wrong_mask, wrong_ids, wrong_block, wrong_between)


MEASURES: tuple[Callable[[nn.Module, int], Any], ...] = (
    curve, one_by_one, importance, read, measured, studied,
)  # fmt: skip


def whole_model() -> nn.Module:
    return tiny_model("llama", seed=1, dtype=torch.float64)


def of_ranks(folder: Path, ranks: int, *ways: str) -> list[dict[str, Any]]:
    """What each of these processes found, by way."""
    command = [sys.executable, "-m", "tests.support.ways_to_measure", folder, *ways]
    for done in warm.run_ranks(command, ranks, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def main(folder: str, *ways: str) -> None:
    rank, _ = begin()
    found: dict[str, Any] = {}
    for way in ways:
        model: Any = whole_model()
        model = WAYS[way](model) or model
        # Some positions at a time, so that processes read the head and run at other times.
        with patch.object(sweep, "_CACHED", 3 * 67), patch.object(reach, "_MASK_ELEMENTS", 1 << 11):
            found[way] = {each.__name__: each(model, rank) for each in MEASURES}
        found[way]["wrong"] = wrong_on_one(model, rank)
        if not way.startswith("flat"):
            found[way]["gradient"] = gradient(model, rank)
    torch.save(found, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort or wait in an orderly exit: nothing of ours is left


if __name__ == "__main__":
    main(*sys.argv[1:])
