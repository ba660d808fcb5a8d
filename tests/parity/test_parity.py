"""The same term whatever way a step is run: accumulated, on two processes, by kernel, by dtype."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softtrace import DensityLoss, DensityOptions
from softtrace.loss import draws
from tests.loss.test_gradients import replay
from tests.support.tiny import FAMILIES, tiny_model
from tests.support.ways_to_step import (
    IN_PARALLEL,
    OPTIONS,
    RANKS,
    accumulated_and_whole,
    both,
    collected,
    gradient_of,
    micro_batches,
    run_ranks,
    task_loss,
    with_and_without_checkpointing,
)


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


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_equal_one_batch(parts: int) -> None:
    (terms, gradients), (term, gradient) = accumulated_and_whole(parts)
    assert term > 0.1
    torch.testing.assert_close(terms, term, atol=0, rtol=1e-12)
    torch.testing.assert_close(gradients, gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("options", IN_PARALLEL, ids=str)
def test_checkpointing_changes_nothing(options: dict[str, Any]) -> None:
    (term, gradient), (again, recomputed) = with_and_without_checkpointing(options)
    torch.testing.assert_close(again, term, atol=0, rtol=1e-12)
    torch.testing.assert_close(recomputed, gradient, atol=1e-12, rtol=1e-9)


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
            monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
            task, term = both(model, penalty, ids, mask)
            losses.append(term.item())
            serial.append(gradient_of(model, task + term))
        average = (serial[0] + serial[1]) / 2
        torch.testing.assert_close(parallel[0][index], average, atol=1e-9, rtol=1e-7)
        monkeypatch.setattr(draws, "rank", lambda: 0)
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
