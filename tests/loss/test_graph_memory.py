"""One memory for several graphs: what is read after a replay lies outside of it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.loss.cuda_graphs import Captured, zero_unless
from softtrace.loss.fused import Run, Tensors
from softtrace.loss.graph_memory import GraphMemory
from tests.support.cuda_on_cpu import pretend
from tests.support.skips import cuda

SIZE = 64 * 2**20  # bytes of what a run holds inside of the graphs' memory


def squares(into: Tensors | None = None) -> list[Tensor | None]:
    return [torch.arange(3.0).square(), None, torch.zeros(2, 1).expand(2, 2)]


def test_what_a_function_gives_lies_outside_of_what_it_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    given = []

    def run(into: Tensors | None = None) -> list[Tensor | None]:
        given.append(squares())
        if into is not None:
            assert torch.equal(into[0].copy_(given[-1][0]), given[0][0])
            return [*into[:2], given[-1][2]]  # the first is written already
        return given[-1]

    _, found = GraphMemory().capture(run)
    assert len(given) == 2
    for own, *others in zip(found, *given, strict=True):
        for other in others:
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                assert torch.equal(own, other)
                assert own.is_contiguous()
                assert own.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_graphs_of_one_memory_share_it_and_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    memory = GraphMemory()
    first, second, third = (memory.capture(squares)[0] for _ in range(3))
    other, _ = GraphMemory().capture(squares)
    graphs: list[Any] = [first, second, third, other]
    assert [each.memory for each in graphs] == [first, first, first, other]
    assert len({each.stream for each in graphs[:3]}) == 1


def test_a_memory_in_which_a_capture_failed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    memory = GraphMemory()
    first, _ = memory.capture(squares)

    def failing(at: int) -> Run:
        calls = iter(range(3))

        def run(into: Tensors | None = None) -> list[Tensor | None]:
            if next(calls) == at:
                raise RuntimeError("no way")
            return squares()

        return run

    with pytest.raises(RuntimeError, match="no way"):
        memory.capture(failing(0))  # before the capture began
    second, _ = memory.capture(squares)
    with pytest.raises(RuntimeError, match="no way"):
        memory.capture(failing(1))
    third, _ = memory.capture(squares)
    fourth, _ = memory.capture(squares)
    graphs: list[Any] = [first, second, third, fourth]
    assert [each.memory for each in graphs] == [first, first, third, third]
    assert graphs[1].stream is not graphs[2].stream


def test_nothing_is_collected_inside_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    seen: list[bool] = []

    def run(into: Tensors | None = None) -> list[Tensor | None]:
        if into is not None:
            seen.append(gc.isenabled())
            if len(seen) == 2:
                raise RuntimeError("no way")
        return squares()

    memory = GraphMemory()
    memory.capture(run)
    with pytest.raises(RuntimeError, match="no way"):
        memory.capture(run)
    assert seen == [False, False]
    assert gc.isenabled()


def test_a_function_gives_none_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    calls = iter(([None], [torch.zeros(1)]))
    with pytest.raises(RuntimeError, match="None at one call and a tensor at another"):
        GraphMemory().capture(lambda into=None: next(calls))


class OnGpu:
    """``Σ ((Wx)·n)²`` of a weight of its own size, by way of as much memory as :data:`SIZE`."""

    def __init__(self, factor: float, memory: GraphMemory) -> None:
        self.model, self.factor = nn.Linear(8, 8, bias=False).cuda(), factor
        own = torch.zeros(8, device="cuda")

        def run(into: Tensors | None = None) -> list[Tensor | None]:
            weight = self.model.weight.detach().requires_grad_()
            found = self.of(weight, own)
            number = zero_unless(found.isfinite(), found, [weight], [into and into[1]])
            (gradient,) = torch.autograd.grad(found, [weight])
            assert into is None or gradient is into[1]
            return [number, gradient]

        self.graph = Captured(run, [own], 1, self.model, memory)

    def of(self, weight: Tensor, x: Tensor) -> Tensor:
        wide = (weight @ x).repeat(SIZE // 4 // 8) * self.factor
        return wide.square().mean()

    def replayed(self, x: Tensor) -> Tensor:
        """Its number, held against the same without a graph; gradients wait in the graph."""
        (found,) = self.graph.replay([x])
        torch.testing.assert_close(found.detach(), self.of(self.model.weight, x).detach())
        return found

    def gradient(self, x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(self.of(self.model.weight, x), [self.model.weight])
        return found


@cuda
def test_graphs_of_one_memory_are_replayed_in_any_order() -> None:
    memory = GraphMemory()
    runs = [OnGpu(factor, memory) for factor in (1.0, 3.0, 0.5)]
    assert len({each.graph._graph.pool() for each in runs}) == 1
    torch.manual_seed(0)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 1)):
        values = [torch.randn(8, device="cuda") for _ in runs]
        for number in order:  # gradients right after each
            runs[number].model.zero_grad()
            runs[number].replayed(values[number]).backward()
            found = runs[number].model.weight.grad
            torch.testing.assert_close(
                found, runs[number].gradient(values[number]), rtol=1e-4, atol=1e-4
            )
        numbers = {n: runs[n].replayed(values[n]) for n in dict.fromkeys(order)}
        for number, found in numbers.items():  # once all others have been replayed
            (given,) = torch.autograd.grad(found, [runs[number].model.weight])
            torch.testing.assert_close(
                given, runs[number].gradient(values[number]), rtol=1e-4, atol=1e-4
            )


@cuda
def test_graphs_of_one_memory_need_no_more_than_the_largest() -> None:
    gc.collect()  # of other tests, or it is let go between the two measurements
    torch.cuda.empty_cache()
    memory = GraphMemory()
    held = [OnGpu(1.0, memory)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held += [OnGpu(factor, memory) for factor in (2.0, 3.0)]
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < SIZE
    held.append(OnGpu(4.0, GraphMemory()))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before > SIZE  # what each would need for itself


@cuda
def test_after_a_capture_that_failed_others_are_captured_and_replayed() -> None:
    memory = GraphMemory()
    first = OnGpu(1.0, memory)
    with pytest.raises(RuntimeError):
        memory.capture(lambda into=None: [torch.zeros(1) + float(torch.ones(1, device="cuda"))])
    later = [OnGpu(factor, memory) for factor in (2.0, 3.0)]
    pools = [each.graph._graph.pool() for each in (first, *later)]
    assert pools[0] != pools[1] == pools[2]
    x = torch.arange(8.0, device="cuda")
    for each in (first, *later, first):
        each.model.zero_grad()
        each.replayed(x).backward()
        torch.testing.assert_close(each.model.weight.grad, each.gradient(x), rtol=1e-4, atol=1e-4)
