"""Which graphs are made, what a replay gives, and what happens where none can be; without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.loss.cuda_graphs import Captured, CudaGraphs, with_weights, zero_unless
from softtrace.loss.fused import Tensors
from softtrace.loss.graph_memory import GraphMemory
from tests.support.cuda_on_cpu import pretend


@pytest.fixture
def graphs() -> CudaGraphs:
    return CudaGraphs("these runs", "Do without.")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def captured(model: nn.Linear) -> tuple[Captured, list[Tensor]]:
    """A graph of ``Σ model(x)²``, whose replay computes anew into the same memory."""
    own = [torch.zeros(3)]

    def run(into: Tensors | None = None) -> list[Tensor | None]:
        x = own[0].detach().requires_grad_()
        weight = model.weight.detach().requires_grad_()
        found = (weight @ x).square().sum()
        by_x, by_weight = torch.autograd.grad(found, [x, weight])
        if into is not None and into[4] is not None:
            by_weight = into[4].copy_(by_weight)
        return [found.detach(), None, found.detach() + 1, by_x, by_weight, None]

    graph = Captured(run, own, 3, model, GraphMemory())

    def replay() -> None:
        first, second = graph._numbers
        places = [first, None, second, *graph.gradients]
        for place, value in zip(places, run(places), strict=True):
            if place is not None and value is not None:
                place.copy_(value)

    graph._graph.replay = replay
    return graph, own


def test_a_replay_gives_numbers_and_gradients_of_the_values_and_weights_then(on_cpu: None) -> None:
    model = nn.Linear(3, 2)  # nothing goes to its bias
    graph, _ = captured(model)
    for scale in (1.0, 3.0):
        x = torch.arange(3.0, requires_grad=True)
        first, second = graph.replay([scale * x], [scale * x])
        assert second == first.detach() + 1
        assert graph.awaited
        (2 * first).backward()
        assert not graph.awaited
        again = torch.arange(3.0, requires_grad=True)
        (weight_gradient,) = torch.autograd.grad(
            (2 * (model.weight @ (scale * again)).square()).sum(), [model.weight], retain_graph=True
        )
        (2 * (model.weight @ (scale * again)).square()).sum().backward()
        torch.testing.assert_close(x.grad, again.grad)
        assert model.bias.grad is None
        torch.testing.assert_close(model.weight.grad, 2 * weight_gradient)
        model.zero_grad()
        with torch.no_grad():
            model.weight.mul_(1.5)


def test_a_replay_is_awaited_until_its_backward_pass_or_until_it_is_dropped(on_cpu: None) -> None:
    graph, _ = captured(nn.Linear(3, 2))
    x = torch.ones(3)
    first, _ = graph.replay([x], [x])
    assert graph.awaited
    del first
    assert not graph.awaited
    first, _ = graph.replay([x], [x])
    graph.replay([x], [x])
    with pytest.raises(RuntimeError, match="replayed or added up since"):
        first.backward()


def test_gradients_are_added_without_a_copy_and_given_as_one(on_cpu: None) -> None:
    model = nn.Linear(3, 2)
    graph, _ = captured(model)
    x, weight = torch.arange(3.0), model.weight

    def exact(by: float) -> Tensor:
        return torch.autograd.grad(by * (weight @ x).square().sum(), weight)[0]

    first, _ = graph.replay([x], [x])
    (given,) = torch.autograd.grad(2 * first, weight, retain_graph=True)
    torch.testing.assert_close(given, exact(2))
    (3 * first + weight.sum()).backward()  # after it was given, and beside another gradient
    torch.testing.assert_close(weight.grad, exact(3) + 1)
    with pytest.raises(RuntimeError, match="added up since"):
        first.backward()
    # The graph's own memory held the product, which was neither given away nor kept as .grad.
    assert graph.gradients[1] is not None
    torch.testing.assert_close(graph.gradients[1], exact(3))
    weight.grad = None
    graph.replay([x], [x])[0].backward()
    graph.replay([2 * x], [x])[0].backward()
    torch.testing.assert_close(weight.grad, 5 * exact(1))
    torch.testing.assert_close(given, exact(2))


def test_gradients_that_share_memory_are_multiplied_once(on_cpu: None) -> None:
    model = nn.Linear(2, 2)
    model.bias = nn.Parameter(torch.zeros(2, 2))

    def run(into: Tensors | None = None) -> list[Tensor | None]:
        both = torch.ones(2, 2)
        return [both.sum(), both, both]  # as of a sum of two weights

    graph = Captured(run, [torch.zeros(1)], 1, model, GraphMemory())
    graph._graph.replay = lambda: None
    (first,) = graph.replay([torch.zeros(1)])
    (2 * first).backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((2, 2), 2.0))
    assert torch.equal(model.bias.grad, torch.full((2, 2), 2.0))


def test_gradients_are_zero_where_not_all_was_finite_in_the_memory_that_is_given() -> None:
    leaves = [torch.arange(3.0).requires_grad_() for _ in range(3)]
    places = [torch.full((3,), 7.0), None, torch.full((3,), 7.0)]
    for finite in (True, False):
        number = (leaves[0] * 2 + leaves[1].expand(2, 3)).sum()
        found = zero_unless(torch.tensor(finite), number, leaves, places)
        assert found == (number if finite else 0)
        one, two, none = torch.autograd.grad(number, leaves, allow_unused=True)
        assert one is places[0]
        assert torch.equal(one, torch.full((3,), 4.0 * finite))
        assert torch.equal(two, torch.full((3,), 2.0 * finite))
        assert none is None
        for each in leaves:
            each._backward_hooks.clear()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_a_gradient_that_is_undefined_stays_so() -> None:
    leaf, place = torch.arange(3.0).requires_grad_(), torch.full((3,), 7.0)
    number = NoGradient.apply(leaf).sum()
    zero_unless(torch.tensor(True), number, [leaf], [place])
    assert torch.autograd.grad(number, [leaf], allow_unused=True) == (None,)


def test_a_replay_without_anything_to_learn_has_no_graph(on_cpu: None) -> None:
    model = nn.Linear(3, 2)
    graph, _ = captured(model)
    model.requires_grad_(False)
    first, _ = graph.replay([torch.ones(3)], [torch.ones(3)])
    assert not first.requires_grad
    assert not graph.awaited


def asked(graphs: CudaGraphs, key: str, cannot: tuple[bool, ...], fuse: bool = True) -> list[Any]:
    """What four steps get, where captures that are fused, or those that are not, fail."""

    def capture(fused: bool) -> Any:
        if fused in cannot:
            raise RuntimeError(f"no way\nfused: {fused}")
        return SimpleNamespace(awaited=False, fused=fused)

    return [graphs.of(key, capture, fuse) for _ in range(4)]


def test_a_key_is_captured_once_it_comes_back(graphs: CudaGraphs) -> None:
    found = asked(graphs, "one", cannot=())
    assert found[:2] == [None, None]
    assert found[2] is found[3]
    assert found[2].fused
    assert asked(graphs, "two", cannot=(), fuse=False)[-1].fused is False
    found[2].awaited = True
    assert asked(graphs, "one", cannot=()) == [None] * 4
    for number in range(4):  # no more than four are held
        asked(graphs, str(number), cannot=())
    assert list(graphs.known) == ["one", "two", "0", "1"]


def test_what_cannot_be_fused_is_captured_as_it_is(
    graphs: CudaGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked(graphs, "one", cannot=(True,))[-1].fused is False
    assert not graphs.refused
    assert [record.getMessage() for record in caplog.records] == [
        "these runs cannot be compiled here and are captured as they are (fuse=False). "
        "What happened: RuntimeError: no way"
    ]


def test_what_the_compiler_stumbled_over_is_said(
    graphs: CudaGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise MemoryError("no room\nfor this")

    def capture(fused: bool) -> Any:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))

    for _ in range(3):
        graphs.of("one", capture, fuse=True)
    said = [each.getMessage() for each in caplog.records if each.name.startswith("softtrace")]
    assert len(said) == 2  # fused, and not
    assert all(each.endswith("What happened: MemoryError: no room") for each in said)


def test_the_compiler_is_not_asked_twice(graphs: CudaGraphs) -> None:
    asked(graphs, "one", cannot=(True,))
    assert asked(graphs, "two", cannot=())[-1].fused is False


def test_what_cannot_be_captured_is_tried_once(
    graphs: CudaGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked(graphs, "one", cannot=(False,), fuse=False) == [None] * 4
    assert graphs.refused
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("these runs cannot be captured as a CUDA graph here")
    assert said.endswith("Do without. What happened: RuntimeError: no way")


def test_weights_that_several_modules_have_are_swapped_and_put_back() -> None:
    """One weight in two modules (tied embeddings), one module in two places (VB-LoRA's bank)."""
    bank = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 2))})
    model = nn.ModuleDict({"embedding": nn.Embedding(2, 2), "head": nn.Linear(2, 2, bias=False)})
    for each in model.values():
        each.bank = bank
    embedding: Any = model["embedding"]
    head: Any = model["head"]
    head.weight = embedding.weight
    before = dict(model.named_parameters(remove_duplicate=False))
    new = {name: 3 * each.detach() for name, each in model.named_parameters()}

    def seen() -> list[Tensor]:
        return [embedding.weight, head.weight, embedding.bank["default"], head.bank["default"]]

    found = with_weights(model, new, seen)
    assert [id(each) for each in found] == [id(each) for each in new.values() for _ in range(2)]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert model["head"].weight is embedding.weight
