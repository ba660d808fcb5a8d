"""A model in parts on several processes, and the same steps of one process on all of their batches.

Run as a module this is one of the processes: ``FOLDER WAY...``, with the variables of torchrun.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from softtrace import DensityLoss, attach, density_curve
from softtrace.errors import SofttraceError
from softtrace.loss import density_loss
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.waiting import PATIENCE

ROWS, LENGTH, STEPS = 3, 9, 10
PADDED = 4  # the step at which the last process has nothing but padding
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"share": 0.6, "crop": 6, "every": 2, "exits": 0.6, "exit_tokens": 0.5},
    "soft": {
        "share": 1.0, "masks": "soft", "size_weight": 0.3, "attention": "recomputed",
        "exits": 0.6, "exit_tokens": 0.5,
    },
}  # fmt: skip


def by_layer(model: Any, **policy: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)


def with_head_unit(model: Any) -> None:
    """As accelerate and torchtitan do it: the final norm and the head are one unit."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    by_layer(model)


def with_resharded_head_unit(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard([model.model.norm, model.lm_head])
    by_layer(model)


def as_one(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def by_half_layer(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer.mlp)
    fully_shard(model.lm_head)
    fully_shard(model.model.norm)
    by_layer(model)


def checkpointed(model: Any) -> None:
    """Layers that run again in the backward pass; the root is let go after its forward too."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    by_layer(model, reshard_after_forward=True)


def offloaded(model: Any) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    by_layer(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


WAYS: dict[str, Callable[[Any], None]] = {
    "by layer": by_layer,
    "norm and head": with_head_unit,
    "norm and head, let go": with_resharded_head_unit,
    "as one": as_one,
    "by half layer": by_half_layer,
    "checkpointed": checkpointed,
    "offloaded": offloaded,
}


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]`` of one process; the last one's are all padding at one step."""
    ids = tiny_prompt(LENGTH, seed=10 * step + rank, batch=ROWS)
    mask = torch.ones_like(ids)
    mask[0, : 1 + rank] = 0
    if step == PADDED and rank == ranks - 1:
        mask[:] = 0
    return ids, mask


def loss_of(model: nn.Module, density: DensityLoss, step: int, rank: int, ranks: int) -> Tensor:
    """Task loss of a watched forward, over a fixed number of tokens, and the term."""
    ids, mask = batch(step, rank, ranks)
    with density.watching(step=step) as watched:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = ids.masked_fill(mask == 0, -100)[:, 1:].flatten()
    task = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    labels = ids.masked_fill(mask == 0, -100)
    term = density(ids, mask, labels=labels, step=step, watched=watched).loss
    return task / ids.numel() + term


def model_and_optimizer(
    shard: Callable[[Any], None] | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_model("llama", seed=1, dtype=torch.float64).train()
    if shard is not None:
        shard(model)
    # AdamW would blow the rounding of a gradient of next to nothing up to a whole step.
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of the model that is not sharded."""
    found = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().clone()
    return found


def trained(
    way: str | None, options: dict[str, Any], steps: int, rank: int, ranks: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of the steps and weights after them.

    Args:
        way: to shard the model; None for one process that goes through all processes' batches.
        options: of the term.
        steps: how many.
        rank: of this process.
        ranks: how many there are.
    """
    model, optimizer = model_and_optimizer(None if way is None else WAYS[way])
    density = DensityLoss(model, **options)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        if way is not None:
            loss = loss_of(model, density, step, rank, ranks)
            loss.backward()
            losses.append(loss.detach())
        else:
            for each in range(ranks):
                with patch.object(density_loss, "_rank", lambda each=each: each):
                    loss = loss_of(model, density, step, each, ranks)
                loss.backward()
                losses.append(loss.detach())
            for weight in model.parameters():  # not the loss: a term's is a float32
                weight.grad /= ranks
        optimizer.step()
    return losses, whole_weights(model)


def untouched() -> list[Tensor]:
    """Weights after three steps, without a term and with one of strength 0."""
    found = []
    for strength in (None, 0.0):
        model, optimizer = model_and_optimizer(by_layer)
        density = None if strength is None else DensityLoss(model, strength=strength)
        for step in range(3):
            optimizer.zero_grad()
            ids, mask = batch(step, 0, 1)
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            if density is not None:
                loss = loss + density(ids, mask, labels=ids).loss
            loss.backward()
            optimizer.step()
        found.append(torch.cat([each.flatten() for each in whole_weights(model).values()]))
    return found


def accumulated() -> list[Tensor]:
    """Gradients of two batches, reduced once or each."""
    found = []
    for once in (False, True):
        model: Any = model_and_optimizer(by_layer)[0]
        density = DensityLoss(model, **OPTIONS["default"])
        for number in range(2):
            model.set_requires_gradient_sync(not once or number == 1)
            loss_of(model, density, number, torch.distributed.get_rank(), 9).backward()
        found.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    return found


def in_bfloat16() -> list[float]:
    """Terms of a model in bfloat16, and of one that its units compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = []
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype, policy in ((torch.bfloat16, {}), (torch.float32, {"mp_policy": mixed})):
        model = tiny_model("llama", seed=1, dtype=dtype).train()
        by_layer(model, **policy)
        density = DensityLoss(model, **OPTIONS["soft"])
        loss = loss_of(model, density, 0, 0, 2)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        found.append(loss.item())
    return found


def curve() -> Tensor:
    """Total variation of a batch, measured on a model that is sharded."""
    model = tiny_model("llama", seed=1, dtype=torch.float64)
    by_layer(model)
    return density_curve(model, *batch(0, 0, 1)).total_variation


def refusals(rank: int) -> dict[str, str]:
    """What each process says of a model or batch that cannot be, of one process or of all."""
    from torch.distributed.fsdp import fully_shard

    model: Any = model_and_optimizer(by_layer)[0]
    density = DensityLoss(model, share=1.0, exits=0.0)
    ids, mask = batch(0, rank, 2)
    nan = torch.tensor(torch.nan if rank == 1 else 1.0, dtype=torch.float64)

    def wrong_mask() -> None:
        density(ids, mask + mask * rank)

    def not_finite() -> None:
        handle = model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * nan,))
        try:
            density(ids, mask)
        finally:
            handle.remove()

    def unit_around() -> None:
        inner = tiny_model("llama")
        fully_shard(nn.Sequential(inner))
        attach(inner)

    def let_go_after_forward() -> None:
        one = tiny_model("llama")
        fully_shard(one, reshard_after_forward=True)
        attach(one)

    found = {}
    for wrong in (wrong_mask, not_finite, unit_around, let_go_after_forward):
        try:
            wrong()
        except SofttraceError as error:
            found[wrong.__name__] = f"{type(error).__name__}: {error}"
    assert density(ids, mask).loss.requires_grad  # and continues
    return found


@contextmanager
def one_process_group() -> Iterator[None]:
    """A group of this process alone, in which everything is sharded into one part."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def begin() -> tuple[int, int]:
    """Meet the other processes; rank and how many."""
    faulthandler.dump_traceback_later(PATIENCE - 20, exit=True)  # a hang says where it hung
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this host need not lead anywhere
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE / 2))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def runs(ways: Sequence[str]) -> list[tuple[str, str, int]]:
    """Way, options and number of steps: the first way is trained for longer."""
    return [(ways[0], "default", STEPS), *((way, "soft", 2) for way in ways)]


def of_ranks(folder: Path, ranks: int, *ways: str) -> list[dict[str, Any]]:
    """What each of these processes found; see :func:`main`."""
    command = [sys.executable, "-m", "tests.support.ways_to_shard", folder, *ways]
    for done in warm.run_ranks(command, ranks, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def main(folder: str, *ways: str) -> None:
    rank, ranks = begin()
    found: dict[str, Any] = {
        f"{way}, {name}": trained(way, OPTIONS[name], steps, rank, ranks)
        for way, name, steps in runs(ways)
    }
    others = {} if len(ways) == 1 else {
        "untouched": untouched(), "accumulated": accumulated(), "in bfloat16": in_bfloat16(),
        "curve": curve(), "refusals": refusals(rank),
    }  # fmt: skip
    torch.save({**found, **others}, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort or wait in an orderly exit: nothing of ours is left


if __name__ == "__main__":
    main(*sys.argv[1:])
