"""What is fused: cut where it repeats, equal parts once, and the same values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from softtrace.loss.fused import _written, cut, cut_where_it_repeats, fused, write_into_arguments

LAYERS = 12


def run(given: Sequence[Tensor]) -> list[Tensor | None]:
    """Twelve equal layers of ten operations and more, their backward pass, and what differs."""
    hidden, *weights = (each.detach().requires_grad_() for each in given)
    stream = (hidden * 2).cumsum(0)
    for weight in weights:
        inner = stream @ weight
        for _ in range(20):
            inner = (inner.sin() + 0.1) * 0.9
        stream = stream + inner
    loss = (stream.softmax(-1) * hidden).square().sum()
    return [loss.detach(), None, *torch.autograd.grad(loss, [hidden, *weights])]


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4, dtype=torch.float64) for _ in range(1)] + [
        torch.randn(4, 4, dtype=torch.float64) for _ in range(LAYERS)
    ]


def kinds(parts: fx.GraphModule) -> list[str]:
    return [
        _written(part) for _, part in parts.named_children() if isinstance(part, fx.GraphModule)
    ]


def test_equal_layers_are_equal_parts_and_all_parts_together_the_whole() -> None:
    given = inputs()
    traced = make_fx(run)(given)
    parts = cut_where_it_repeats(traced)
    found = kinds(parts)
    repeated = [found.count(each) for each in set(found) if found.count(each) > 1]
    assert len(repeated) == 2  # forward and backward pass
    assert min(repeated) >= LAYERS - 3
    assert len(set(found)) <= 8
    for one, other in zip(parts(*given), run(given), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_what_is_given_is_written_into_arguments_as_soon_as_it_is_complete() -> None:
    given = inputs()
    plain, traced = make_fx(run)(given), make_fx(run)(given)
    likes = write_into_arguments(traced)
    wanted = run(given)
    assert [each is None for each in likes] == [each is None for each in wanted]
    into = [each if each is None else each.new() for each in likes]
    parts = cut_where_it_repeats(traced)
    assert len(set(kinds(parts))) <= len(set(kinds(cut_where_it_repeats(plain))))
    assert not parts(*given, *(each for each in into if each is not None))
    for one, other in zip(into, wanted, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)
    nodes = list(traced.graph.nodes)
    writes = [node for node in nodes if node.target is torch.ops.aten.copy_.default]
    assert len(writes) == len(wanted) - 1
    for each in writes:  # each copy comes right after what it copies
        assert nodes.index(each) - nodes.index(each.args[1]) <= 1


def test_a_function_may_give_what_it_was_given_and_the_same_twice() -> None:
    def same(given: Sequence[Tensor]) -> list[Tensor | None]:
        doubled = given[0] * 2
        return [given[0], doubled, None, doubled]

    x = torch.arange(3.0)
    call = fused(same, [x], "eager")
    one, two, none, three = call()
    assert none is None
    for own, wanted in ((one, x), (two, 2 * x), (three, 2 * x)):
        assert torch.equal(own, wanted)
    assert len({each.data_ptr() for each in (x, one, two, three)}) == 4


def test_what_is_traced_is_cut_where_it_is_told_to_be() -> None:
    def twice(given: Sequence[Tensor]) -> list[Tensor | None]:
        x, total = given[0], given[1]
        for _ in range(2):
            total = cut(total)
            total = total + (x.sin() @ x).sum()
        return [total]

    given = [torch.randn(3, 3), torch.zeros(())]
    traced = make_fx(twice)(given)
    parts = cut_where_it_repeats(traced)
    first, second = kinds(parts)
    assert first == second
    assert "cut" not in first
    torch.testing.assert_close(parts(*given)[0], twice(given)[0])
    (found,) = fused(twice, given, "eager")()
    torch.testing.assert_close(found, twice(given)[0])


def test_each_kind_of_part_is_compiled_once() -> None:
    given, compiled = inputs(), []

    def compile_part(part: nn.Module, **options: Any) -> nn.Module:
        assert options["fullgraph"]
        compiled.append(part)
        return part

    with patch("torch.compile", compile_part):
        call = fused(run, given)
    assert len(compiled) <= 8
    given[1].mul_(1.5)  # read in place
    into = [each if each is None else torch.empty_like(each) for each in run(given)]
    for found in (call(), call(into)):
        assert (found[0] is into[0]) == (found is into)
        for one, other in zip(found, run(given), strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)


def test_what_reads_other_constants_is_not_equal() -> None:
    tables = torch.randn(2, 3)

    def read(table: Tensor) -> fx.GraphModule:
        return make_fx(lambda x: [x * table])(torch.ones(3))

    first, other = read(tables[0]), read(tables[1])
    for graph in (first, other):
        assert any(node.op == "get_attr" for node in graph.graph.nodes)
    assert _written(first) == _written(first)
    assert _written(first) != _written(other)


def test_what_never_repeats_is_one_part() -> None:
    traced = make_fx(lambda x: [x.sin().cos() + 1])(torch.ones(3))
    parts = cut_where_it_repeats(traced)
    assert len(kinds(parts)) == 1
    torch.testing.assert_close(parts(torch.ones(3))[0], torch.ones(3).sin().cos() + 1)


def test_a_model_of_many_shapes_is_compiled_whole() -> None:
    """Weights in twelve shapes, each detached first, as adapters on all projections are."""
    weights = [torch.randn(4, 3 + k // 40) for k in range(12 * 40)]

    def sums(given: Sequence[Tensor]) -> list[Tensor | None]:
        x, *own = (each.detach() for each in given)
        return [(x @ own[0]).sum(), (x @ own[-1]).sum()]

    def chains(given: Sequence[Tensor]) -> list[Tensor | None]:
        return [_chain(each).sum() for each in given[1::40]]

    given, counts = [torch.randn(2, 4), *weights], []
    for function in (sums, chains):
        with patch("torch.compile", side_effect=torch.compile) as compiled:
            call = fused(function, given, "eager")
        counts.append(compiled.call_count)
        for one, other in zip(call(), function(given), strict=True):
            assert one is not None
            torch.testing.assert_close(one, other)
    assert counts[0] == 1  # weights that are only detached are no operations
    assert counts[1] >= 12  # of the chains every part has a shape of its own


def _chain(values: Tensor) -> Tensor:
    for _ in range(30):
        values = values.sin() * 0.9
    return values
