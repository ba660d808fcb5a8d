"""Weights in parts as DeepSpeed's ZeRO 3 leaves them, without DeepSpeed: what stands in for it.

With it the same is run in several processes (``loss/test_zero.py``).
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.model.hooks import Hook, register
from softtrace.model.zero_units import apart, beside_other_forwards, copied, gather, let_go_of
from tests.support.tiny import tiny_model


class Root(nn.Sequential):
    """Two layers whose weights are kept in parts, as ``deepspeed.initialize`` leaves a model."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))
        self.ds_inflight_param_registry: dict[nn.Parameter, Any] = {}
        for number, module in enumerate(self.modules()):
            module.ds_id = number  # type: ignore[assignment]
        for number, weight in enumerate(self.parameters()):
            put_in_parts(weight, number)


def put_in_parts(weight: Any, number: int) -> None:
    whole = weight.data.clone()
    weight.ds_id, weight.ds_shape, weight.ds_numel = number, whole.shape, whole.numel()
    weight.ds_active_sub_modules = set()

    def become(status: str) -> None:
        weight.ds_status = SimpleNamespace(name=status)
        weight.data = whole if status == "AVAILABLE" else whole.new_empty(0)

    weight.become = become
    weight.all_gather = lambda param_list: [each.become("AVAILABLE") for each in param_list]
    weight.partition = lambda param_list: [each.become("NOT_AVAILABLE") for each in param_list]
    become("NOT_AVAILABLE")


def statuses(module: nn.Module) -> list[str]:
    weights: list[Any] = list(module.parameters())
    return [each.ds_status.name for each in weights]


def test_weights_are_gathered_and_let_go_of() -> None:
    root = Root()
    gathered = gather(root[0], root)
    assert statuses(root) == ["AVAILABLE"] * 2 + ["NOT_AVAILABLE"] * 2
    assert gather(root[0], root) == []  # so that who has them already keeps them
    root[0].bias.ds_active_sub_modules.add(1)  # type: ignore[union-attr, operator]
    let_go_of(gathered)
    assert statuses(root[0]) == ["NOT_AVAILABLE", "AVAILABLE"]  # a forward has the other


def test_what_is_on_its_way_is_waited_for_and_left_to_who_asked_for_it() -> None:
    root = Root()
    weight: Any = root[0].weight
    weight.ds_status = SimpleNamespace(name="INFLIGHT")
    arriving = SimpleNamespace(wait=lambda: weight.become("AVAILABLE"))
    root.ds_inflight_param_registry[weight] = arriving
    assert gather(root[0], root) == [root[0].bias]
    assert root.ds_inflight_param_registry == {}
    assert statuses(root[0]) == ["AVAILABLE"] * 2


@pytest.mark.parametrize("later", ["NOT_AVAILABLE", "AVAILABLE"])
def test_gradients_reach_a_weight_that_was_let_go_of(later: str) -> None:
    root = Root()
    weight: Any = root[0].weight
    let_go_of_it = gather(root[0], root)
    wanted = torch.autograd.grad(weight.square().sum(), weight)[0]
    copy = copied(weight)
    let_go_of(let_go_of_it)
    if later == "AVAILABLE":
        weight.register_hook(lambda gradient: weight.become("AVAILABLE"))
    copy.square().sum().backward()
    assert torch.equal(weight.grad, wanted)
    assert weight.shape == ((0,) if later == "NOT_AVAILABLE" else wanted.shape)


def test_a_copy_of_a_frozen_weight_has_no_graph() -> None:
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    assert not copied(weight).requires_grad
    with torch.no_grad():
        assert not copied(nn.Parameter(torch.ones(2))).requires_grad


def test_a_module_apart_has_no_hooks_and_its_weights_are_copies() -> None:
    root = Root()
    gathered = gather(root, root)
    wanted = root(torch.ones(1, 3))

    def never(*args: Any) -> None:
        raise AssertionError("a hook")

    for module in root.modules():
        module.register_forward_pre_hook(never)
        module.register_forward_hook(never)
    alone = apart(root)
    let_go_of(gathered)
    assert torch.equal(alone(torch.ones(1, 3)), wanted)
    alone(torch.ones(1, 3)).sum().backward()
    assert all(each.grad is not None for each in root.parameters())


def counting(module: nn.Module, said: list[str]) -> None:
    """What ZeRO 3 does around a module: a count of gradients of inputs that are to come."""
    state: Any = module

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            state.ds_grads_remaining -= 1
            said.append("let go" if state.ds_grads_remaining == 0 else "kept")
            return gradient

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        state.ds_grads_remaining = int(args[0].requires_grad)
        found: Tensor = Last.apply(args[0])  # type: ignore[no-untyped-call]
        return (found,)

    module.register_forward_pre_hook(before)


@pytest.mark.parametrize("beside", [True, False])
def test_each_forward_lets_go_of_weights_in_its_backward_pass(beside: bool) -> None:
    root, said = Root(), list[str]()
    gather(root, root)
    counting(root[1], said)
    gave = [root(torch.ones(1, 3))]
    for gradients in (True, True, False):  # one without is not waited for
        with (
            torch.set_grad_enabled(gradients),
            beside_other_forwards(root) if beside else nullcontext(),
        ):
            gave.append(root(torch.ones(1, 3)))
    torch.cat(gave).sum().backward()
    assert said == (["let go"] * 3 if beside else ["kept"] * 3)


def test_hooks_of_ours_come_before_those_that_gather_and_let_go() -> None:
    order: list[str] = []
    model = tiny_model("llama").lm_head
    model.ds_id = 1  # type: ignore[assignment]
    model.register_forward_pre_hook(lambda *_: order.append("gather"))
    model.register_forward_hook(lambda *_: order.append("let go"))

    def note(what: str, before: bool, first: bool = False) -> Hook:
        return Hook(model, lambda *_: order.append(what), before, first)

    hooks = [note("one", True), note("two", True), note("three", False), note("four", False)]
    register([*hooks, note("first", False, True)], [])
    model(torch.ones(1, 32))
    assert order == ["one", "two", "gather", "first", "three", "four", "let go"]
