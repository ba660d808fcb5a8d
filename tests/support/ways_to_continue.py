"""A training by FSDP2 that a checkpoint in parts continues at another number of processes.

Run as a module this is one of the processes: ``FOLDER FROM TO``, with the variables of torchrun.
A step is of :data:`BATCHES` batches, which the processes share. Each batch keeps the draws that it
has in one process that goes through all of them, so that the same steps are taken anywhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from softtrace import DensityLoss
from softtrace.loss import draws
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.units import WAYS
from tests.support.ways_to_shard import OPTIONS, begin, loss_of, model_and_optimizer, whole_weights

BATCHES = 6  # of a step
#: first step, the one after the last, and how many processes take them
LEGS = ((0, 3, 2), (3, 6, 3), (6, 8, 1))


def continued(folder: Path, ranks: int, first: int, last: int) -> dict[str, Tensor]:
    """Weights after these steps, the first of which begins from the last checkpoint in a folder."""
    words = [sys.executable, "-m", "tests.support.ways_to_continue", folder, first, last]
    for done in warm.run_ranks(words, ranks, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def main(folder: str, first: int, last: int) -> None:
    rank, ranks = begin()
    model, optimizer = model_and_optimizer(WAYS["by layer"])
    density = DensityLoss(model, **OPTIONS["default"])

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "density": density.state_dict()}

    if first:
        found = state()
        checkpoint.load(found, checkpoint_id=Path(folder, str(first)))
        set_state_dict(
            model, optimizer, model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
        )  # fmt: skip
        density.load_state_dict(found["density"])
    own = range(rank, BATCHES, ranks)
    for step in range(first, last):
        optimizer.zero_grad()
        for number in own:
            with patch.object(draws, "rank", lambda number=number: number):
                loss = loss_of(model, density, step, number, BATCHES)
            loss.backward()
        for weight in model.parameters():  # not the loss: a term's is a float32
            assert weight.grad is not None
            weight.grad /= len(own)
        optimizer.step()
    checkpoint.save(state(), checkpoint_id=Path(folder, str(last)))
    weights = whole_weights(model)
    if rank == 0:
        torch.save(weights, Path(folder, "weights.pt"))
    torch.distributed.barrier()
    os._exit(0)  # as in ways_to_shard


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
