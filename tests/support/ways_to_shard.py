"""A model in parts on several processes, and the same steps of one process on all of their batches.

Run as a module this is one of the processes: ``FOLDER WAY...``, with the variables of torchrun.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from softtrace import DensityLoss, attach, density_curve
from softtrace.errors import SofttraceError
from softtrace.loss import draws
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.units import WAYS, flat, with_output_dtype
from tests.support.waiting import PATIENCE

WRAPPERS = re.compile(r"_(fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")
ROWS, LENGTH, STEPS = 3, 9, 10
PADDED = 4  # the step at which the last process has nothing but padding
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"share": 0.6, "crop": 6, "every": 2, "exits": 0.6, "exit_tokens": 0.5},
    "soft": {
        "share": 1.0, "masks": "soft", "size_weight": 0.3, "attention": "recomputed",
        "exits": 0.6, "exit_tokens": 0.5,
    },
}  # fmt: skip

#: losses of the steps, weights after them, and the gradients of each
Trained = tuple[list[Tensor], dict[str, Tensor], list[dict[str, Tensor]]]
WHOLE_WAYS = ("by layer", "flat")  # that are tried in all else too


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]`` of one process; the last one's are all padding at one step."""
    ids = tiny_prompt(LENGTH, seed=10 * step + rank, batch=ROWS)
    mask = torch.ones_like(ids)
    mask[0, : 1 + rank] = 0
    if step == PADDED and rank == ranks - 1:
        mask[:] = 0
    return ids, mask


def loss_of(
    model: nn.Module,
    density: DensityLoss,
    step: int,
    rank: int,
    ranks: int,
    host: nn.Module | None = None,
) -> Tensor:
    """Task loss of a watched forward, over a fixed number of tokens, and the term."""
    ids, mask = batch(step, rank, ranks)
    with density.watching(host, step) as watched:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = ids.masked_fill(mask == 0, -100)[:, 1:].flatten()
    task = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    labels = ids.masked_fill(mask == 0, -100)
    term = density(ids, mask, labels=labels, step=step, watched=watched).loss
    return task / ids.numel() + term


def model_and_optimizer(
    shard: Callable[[Any], Any] | None, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: Any = tiny_model("llama", seed=1, dtype=dtype).train()
    if shard is not None:
        made = shard(model)
        model = model if made is None else made
    # AdamW would blow the rounding of a gradient of next to nothing up to a whole step.
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of the model that is not sharded."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    zero = [each for each in model.parameters() if hasattr(each, "ds_id")]
    if zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(zero):
            return {name: each.detach().clone() for name, each in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, value in model.named_parameters():
            whole: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[WRAPPERS.sub("", name)] = whole.detach().clone()
    return found


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the names of the model that is not sharded."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = {}
    flat = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=flat):
        for name, value in model.named_parameters():
            grad: Any = value.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[WRAPPERS.sub("", name)] = whole.detach().clone()
    return found


def trained(
    way: str | None,
    options: dict[str, Any],
    steps: int,
    rank: int,
    ranks: int,
    dtype: torch.dtype = torch.float64,
) -> Trained:
    """Losses of the steps, weights after them, and the gradients of each.

    Args:
        way: to shard the model; None for one process that goes through all processes' batches.
        options: of the term.
        steps: how many.
        rank: of this process.
        ranks: how many there are.
        dtype: of the weights.
    """
    model, optimizer = model_and_optimizer(None if way is None else WAYS[way], dtype)
    density = DensityLoss(model, **options)
    losses, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad()
        if way is not None:
            loss = loss_of(model, density, step, rank, ranks)
            loss.backward()
            losses.append(loss.detach())
        else:
            losses += of_all_ranks(model, density, step, ranks)
        gradients.append(whole_gradients(model))
        optimizer.step()
    return losses, whole_weights(model), gradients


def of_all_ranks(model: nn.Module, density: DensityLoss, step: int, ranks: int) -> list[Tensor]:
    """Losses of all processes' batches in one process, and mean gradients."""
    losses = []
    for each in range(ranks):
        with patch.object(draws, "rank", lambda each=each: each):
            loss = loss_of(model, density, step, each, ranks)
        loss.backward()
        losses.append(loss.detach())
    for weight in model.parameters():  # not the loss: a term's is a float32
        if weight.requires_grad:
            assert weight.grad is not None
            weight.grad /= ranks
    return losses


def untouched(way: str) -> list[Tensor]:
    """Weights after three steps, without a term and with one of strength 0."""
    found = []
    for strength in (None, 0.0):
        model, optimizer = model_and_optimizer(WAYS[way])
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


def accumulated(way: str) -> list[Tensor]:
    """Gradients of two batches, reduced once or each; FSDP1's as the weights after a step."""
    found = []
    for once in (False, True):
        built, optimizer = model_and_optimizer(WAYS[way])
        model: Any = built
        density = DensityLoss(model, **OPTIONS["default"])
        for number in range(2):
            waits = once and number == 0
            flat_waits = model.no_sync() if waits and hasattr(model, "no_sync") else nullcontext()
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(not waits)
            with flat_waits:
                loss_of(model, density, number, torch.distributed.get_rank(), 9).backward()
        optimizer.step()
        found.append(torch.cat([each.flatten() for each in whole_weights(model).values()]))
    return found


def in_bfloat16(way: str) -> list[float]:
    """Terms of a model in bfloat16, and of one that its units compute in bfloat16."""
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    kind: Any = MixedPrecision if way == "flat" else MixedPrecisionPolicy
    mixed = kind(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    name = "mixed_precision" if way == "flat" else "mp_policy"
    found = []
    for dtype, policy in ((torch.bfloat16, {}), (torch.float32, {name: mixed})):
        plain: Any = tiny_model("llama", seed=1, dtype=dtype).train()
        model = WAYS[way](plain, **policy) or plain
        density = DensityLoss(model, **OPTIONS["soft"])
        loss = loss_of(model, density, 0, 0, 2)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.numel()]  # FSDP1 has empty pieces
        assert all(each is not None and each.isfinite().all() for each in gradients)
        found.append(loss.item())
    return found


def giving_more_digits(computes: torch.dtype, gives: torch.dtype) -> Trained:
    """As :func:`trained` for two steps where logits have more digits than what computed them."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shard = partial(with_output_dtype, computes=computes, gives=gives)
    with patch.dict(WAYS, {"more digits": shard}):
        return trained("more digits", OPTIONS["soft"], 2, rank, ranks)


def wrapped_later() -> Tensor:
    """Loss of a step where FSDP1 wrapped the model after the term was made, as Accelerate does."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plain: Any = tiny_model("llama", seed=1, dtype=torch.float64).train()
    density = DensityLoss(plain, **OPTIONS["soft"])
    model = flat(plain)
    loss = loss_of(model, density, 0, rank, ranks, host=model)
    loss.backward()
    return loss.detach()


def curve(way: str) -> Tensor:
    """Total variation of a batch, measured on a model that is sharded."""
    plain = tiny_model("llama", seed=1, dtype=torch.float64)
    return density_curve(WAYS[way](plain) or plain, *batch(0, 0, 1)).total_variation


def said_by(*wrongs: Callable[[], Any]) -> dict[str, str]:
    """What softtrace says of each, by its name."""
    found = {}
    for wrong in wrongs:
        try:
            wrong()
        except SofttraceError as error:
            found[wrong.__name__] = f"{type(error).__name__}: {error}"
    return found


def wrong_on_one(way: str) -> dict[str, str]:
    """What each process says of a batch or a forward that is wrong on the second alone."""
    return said_of_wrong_on_one(model_and_optimizer(WAYS[way])[0])


def said_of_wrong_on_one(model: Any) -> dict[str, str]:
    rank = torch.distributed.get_rank()
    density = DensityLoss(model, share=1.0, exits=0.0)
    ids, mask = batch(0, rank, 2)
    nan = torch.tensor(torch.nan if rank == 1 else 1.0, dtype=model.dtype)

    def wrong_mask() -> None:
        density(ids, mask + mask * rank)

    def not_finite() -> None:
        handle = model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * nan,))
        try:
            density(ids, mask)
        finally:
            handle.remove()

    found = said_by(wrong_mask, not_finite)
    assert density(ids, mask).loss.requires_grad  # and continues
    return found


def refusals() -> dict[str, str]:
    """What is said of models whose units cannot be."""
    from torch.distributed.fsdp import fully_shard

    def unit_around() -> None:
        inner = tiny_model("llama")
        fully_shard(nn.Sequential(inner))
        attach(inner)

    def let_go_after_forward() -> None:
        one = tiny_model("llama")
        fully_shard(one, reshard_after_forward=True)
        attach(one)

    def flat_head() -> None:
        attach(flat(tiny_model("llama"), nn.Linear))

    def flat_inside() -> None:
        inner = tiny_model("llama")
        around = flat(inner)
        attach(inner)
        del around

    return said_by(unit_around, let_go_after_forward, flat_head, flat_inside)


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
        assert ways[0].startswith("ZeRO") or "Warning" not in done.stderr, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def main(folder: str, *ways: str) -> None:
    rank, ranks = begin()
    if ways[0].startswith("ZeRO"):
        from tests.support import ways_to_zero  # which is made from this

        torch.save(ways_to_zero.of_ways(ways, rank, ranks), Path(folder, f"{rank}.pt"))
        torch.distributed.barrier()
        os._exit(0)
    found: dict[str, Any] = {
        f"{way}, {name}": trained(way, OPTIONS[name], steps, rank, ranks)
        for way, name, steps in runs(ways)
    }
    others = {} if len(ways) == 1 else {
        "refusals": refusals(),
        "wrapped later": wrapped_later(),
        "float32 as float64": giving_more_digits(torch.float32, torch.float64),
        "bfloat16 as float32": giving_more_digits(torch.bfloat16, torch.float32),
        **{
            f"{way}, {each.__name__}": each(way)
            for way in WHOLE_WAYS
            for each in (untouched, accumulated, in_bfloat16, curve, wrong_on_one)
        },
    }  # fmt: skip
    torch.save({**found, **others}, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort or wait in an orderly exit: nothing of ours is left


if __name__ == "__main__":
    main(*sys.argv[1:])
