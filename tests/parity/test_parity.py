"""The same term whatever way a step is run: accumulated, on two processes, by kernel, by dtype."""

from __future__ import annotations

import copy
import datetime
import faulthandler
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from softtrace import DensityLoss, DensityOptions
from softtrace import loss as loss_module
from tests.support.waiting import PATIENCE
from tests.test_loss_gradients import replay
from tests.tiny import FAMILIES, checkpointed, tiny_model, tiny_prompt

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


def cosine(first: Tensor, second: Tensor) -> float:
    return torch.cosine_similarity(first.float(), second.float(), dim=0).item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_accumulated_micro_batches_equal_their_sum_by_hand(options: dict[str, Any]) -> None:
    model = tiny_model("llama", seed=1, dtype=torch.float64)
    penalty, batches = DensityLoss(model, **options), micro_batches(2)
    model.zero_grad()
    for number, (ids, mask) in enumerate(batches):
        term = penalty(ids, mask, step=3, micro_step=number)
        ((task_loss(model, ids, mask) + term.loss) / 2).backward()
    accumulated = collected(model)
    by_hand = torch.zeros((), dtype=torch.float64)
    for number, (ids, mask) in enumerate(batches):
        terms = replay(model, penalty.options, ids, mask, 3, number)()
        by_hand = by_hand + (task_loss(model, ids, mask) + terms) / 2
    torch.testing.assert_close(accumulated, gradient_of(model, by_hand), atol=1e-6, rtol=1e-5)
    alone = sum((task_loss(model, *each) / 2 for each in batches), torch.zeros(()))
    assert (gradient_of(model, alone) - accumulated).norm() > 1e-3 * accumulated.norm()


#: nothing is left to draws or to the make-up of a batch: every token, one threshold, fixed depths
FIXED: dict[str, Any] = {
    "share": 1.0, "crop": None, "thresholds": (0.05, 0.05), "depths": (0.5, 0.5),
    "easy_quantile": 1.0, "easy_width": 0.0, "exits": 0.5, "exit_tokens": 1.0,
    "exit_depths": (0.5, 0.5),
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


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(parts: int) -> None:
    (terms, gradients), (term, gradient) = accumulated_and_whole(parts)
    assert term > 0.1
    torch.testing.assert_close(terms, term, atol=0, rtol=1e-12)
    torch.testing.assert_close(gradients, gradient, atol=1e-12, rtol=1e-9)


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


@pytest.mark.parametrize("options", IN_PARALLEL, ids=str)
def test_checkpointing_changes_nothing(options: dict[str, Any]) -> None:
    (term, gradient), (again, recomputed) = with_and_without_checkpointing(options)
    torch.testing.assert_close(again, term, atol=0, rtol=1e-12)
    torch.testing.assert_close(recomputed, gradient, atol=1e-12, rtol=1e-9)


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
    context = torch.multiprocessing.spawn(
        one_rank, (folder,), nprocs=RANKS, join=False, daemon=True
    )
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"no end after {PATIENCE:g} s"
    finally:
        for process in context.processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_average_what_each_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(folder)
        parallel = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(RANKS)]
    assert torch.equal(*parallel)
    for index, options in enumerate(IN_PARALLEL):
        model = tiny_model("llama", seed=1, dtype=torch.float64)
        penalty, serial, losses = DensityLoss(model, **options), [], []
        for rank, (ids, mask) in enumerate(micro_batches(RANKS)):
            monkeypatch.setattr(loss_module, "_rank", lambda rank=rank: rank)
            task, term = both(model, penalty, ids, mask)
            losses.append(term.item())
            serial.append(gradient_of(model, task + term))
        average = (serial[0] + serial[1]) / 2
        torch.testing.assert_close(parallel[0][index], average, atol=1e-9, rtol=1e-7)
        monkeypatch.setattr(loss_module, "_rank", lambda: 0)
        ids, mask = micro_batches(RANKS)[1]
        assert both(model, penalty, ids, mask)[1].item() != losses[1]  # the rank enters the draws


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_the_users_forward_plays_no_part(
    family: str, options: dict[str, Any]
) -> None:
    (ids, mask), values, found = micro_batches(1)[0], [], []
    for kernel in ("sdpa", "eager"):
        model = tiny_model(family, seed=2)
        model.set_attn_implementation(kernel)
        term = DensityLoss(model, **options)(ids, mask, step=1)
        values.append(term.loss.detach())
        alone = gradient_of(model, term.loss)
        together = gradient_of(model, task_loss(model, ids, mask))
        found.append((alone, together))
    assert torch.equal(*values)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)


def rounded_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A float32 and a bfloat16 model of the same weights."""
    exact = tiny_model(family, seed=3).bfloat16().float()
    return exact, copy.deepcopy(exact).bfloat16()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family: str, options: dict[str, Any]) -> None:
    """The term within 0.03; the direction within a cosine of 0.9, or 0.7 where masks are hard.

    Rounding carries some edges over a hard threshold, so the two gradients mask other edges.
    """
    ids, mask = micro_batches(1)[0]
    values, found = [], []
    for model in rounded_pair(family):
        penalty = DensityLoss(model, **options)
        terms = torch.stack([penalty(ids, mask, step=step).loss for step in range(4)])
        assert terms.dtype == torch.float32  # distances are never taken in half precision
        values.append(terms.detach())
        found.append(gradient_of(model, terms.mean()))
    assert (values[0] - values[1]).abs().mean() < 0.03
    assert cosine(*found) > (0.9 if options.get("masks") == "soft" else 0.7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_is_near_float32(family: str, options: dict[str, Any]) -> None:
    ids, mask = micro_batches(1)[0]
    model = tiny_model(family, seed=3)
    penalty = DensityLoss(model, **options)
    steps = range(4)
    exact = torch.stack([penalty(ids, mask, step=step).loss for step in steps])
    own = gradient_of(model, task_loss(model, ids, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = torch.stack([penalty(ids, mask, step=step).loss for step in steps])
        task = task_loss(model, ids, mask)  # after ours: no weight stays cast without a graph
    assert mixed.dtype == torch.float32
    assert (exact - mixed).abs().mean() < 0.03
    assert cosine(gradient_of(model, task), own) > 0.99
    first, second = gradient_of(model, exact.mean()), gradient_of(model, mixed.mean())
    assert cosine(first, second) > 0.9
    sizes = [parameter.numel() for parameter in model.parameters()]
    for one, other in zip(first.split(sizes), second.split(sizes), strict=True):
        assert bool(one.any()) == bool(other.any())  # a weight cast without a graph would be lost
    with torch.autocast("cpu", dtype=torch.bfloat16):  # also when the model is attached inside
        fresh = tiny_model(family, seed=3)
        inside = DensityLoss(fresh, DensityOptions(**options))(ids, mask, step=0)
    assert inside.loss.item() == pytest.approx(mixed[0].item(), abs=1e-5)
