"""One step of the term in several ways: accumulated, recomputed in backward, on two processes."""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softtrace import DensityLoss
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.tiny import checkpointed, tiny_model, tiny_prompt
from tests.support.waiting import PATIENCE

OPTIONS: tuple[dict[str, Any], ...] = (
    {"share": 0.5, "crop": 6},
    {"share": 1.0, "masks": "soft", "size_weight": 0.3, "attention": "recomputed"},
)
IN_PARALLEL = (*OPTIONS, {"share": 0.5, "exits": 0.6, "exit_tokens": 0.5})
RANKS = 2


def micro_batches(count: int, length: int = 8) -> list[tuple[Tensor, Tensor]]:
    found = []
    for number in range(count):
        ids = tiny_prompt(length, seed=40 + number, batch=4)
        mask = torch.ones_like(ids)
        mask[number % 4, :3] = 0
        found.append((ids, mask))
    return found


def task_loss(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    labels = ids.masked_fill(positions == 0, -100)  # nor may padding predict a first token
    options = {"attention_mask": mask, "position_ids": positions, "labels": labels}
    loss: Tensor = model(input_ids=ids, **options).loss
    return loss


def both(
    model: nn.Module, penalty: DensityLoss, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Task loss of a watched forward, and the term of step 5."""
    with penalty.watching():
        task = task_loss(model, ids, mask)
    return task, penalty(ids, mask, step=5).loss


def collected(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()
    ])  # fmt: skip


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return collected(model)


#: nothing is left to draws or to the make-up of a batch: every token, one threshold, fixed depths
FIXED: dict[str, Any] = {
    "share": 1.0, "crop": None, "thresholds": (0.05, 0.05), "depths": (0.5, 0.5),
    "easy_quantile": 1.0, "easy_width": 0.0, "exits": 0.5, "exit_tokens": 1.0,
    "exit_depths": (0.5, 0.5), "exit_quantile": 1.0,
}  # fmt: skip


def accumulated_and_whole(parts: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Terms and gradients of micro-batches, and of the batch that they make up."""
    model = tiny_model("llama", seed=1, dtype=torch.float64)
    penalty = DensityLoss(model, **FIXED)
    ids = torch.cat([tiny_prompt(8, seed=60 + number, batch=2) for number in range(parts)])
    found = []
    for pieces in (ids.chunk(parts), (ids,)):
        model.zero_grad()
        terms = torch.zeros((), dtype=torch.float64)
        for number, piece in enumerate(pieces):
            with penalty.watching():
                task = model(input_ids=piece, labels=piece).loss
            term = penalty(piece, step=3, micro_step=number).loss
            terms += term.detach() / len(pieces)
            ((task + term) / len(pieces)).backward()
        found.append((terms, collected(model)))
    return found[0], found[1]


def with_and_without_checkpointing(options: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Term and gradients of both losses, layers recomputed in backward or not."""
    found = []
    for recomputed in (False, True):
        model = tiny_model("llama", seed=1, dtype=torch.float64).train()
        if recomputed:
            checkpointed(model, use_reentrant=False)
        task, term = both(model, DensityLoss(model, **options), *micro_batches(1)[0])
        found.append((term.detach(), gradient_of(model, task + term)))
    return found


def one_rank(rank: int, folder: str) -> None:
    """A process of the run: gradients of every set of options, averaged by DDP."""
    faulthandler.dump_traceback_later(PATIENCE - 20, exit=True)  # a hang says where it hung
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this host need not lead anywhere
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=PATIENCE / 2),
    )
    found = []
    for options in IN_PARALLEL:
        model = tiny_model("llama", seed=1, dtype=torch.float64)
        wrapped = DistributedDataParallel(model)
        penalty = DensityLoss(model, **options)
        ids, mask = micro_batches(RANKS)[rank]
        loss = sum(both(wrapped, penalty, ids, mask))
        found.append(gradient_of(model, loss))
    torch.save(torch.stack(found), Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort or wait in an orderly exit: nothing of ours is left


def run_ranks(folder: str) -> None:
    """All ranks to their end; what fails or takes too long is an error, and nobody is left."""
    command = [sys.executable, "-m", "tests.support.ways_to_step", folder]
    for done in warm.run_ranks(command, RANKS, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    one_rank(int(os.environ["RANK"]), sys.argv[1])
