"""Hooks of a run: read inputs given either way, replace outputs, leave no unknown handle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtrace.model.hooks import Hook, on_input, on_output, register


class Named(nn.Module):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return hidden_states + 1, "second"


def test_inputs_are_read_and_outputs_replaced_however_they_are_passed() -> None:
    module, seen, handles = Named(), [], list[RemovableHandle]()
    double = on_output(lambda read, output: (2 + read) * output)
    register([Hook(module, on_input(seen.append), True), Hook(module, double, False)], handles)
    x = torch.ones(2)
    for result in (module(x), module(hidden_states=x)):
        assert torch.equal(result[0], torch.full((2,), 6.0))
        assert result[1] == "second"
    assert [torch.equal(found, x) for found in seen] == [True, True]
    for handle in handles:
        handle.remove()
    assert torch.equal(module(x)[0], x + 1)
    assert len(seen) == 2


def test_a_first_hook_runs_before_those_that_were_there() -> None:
    module, order, handles = nn.Identity(), list[str](), list[RemovableHandle]()

    def note(name: str) -> Any:
        return lambda *args: order.append(name)

    module.register_forward_hook(note("user"))
    hooks = [Hook(module, note("ours"), False), Hook(module, note("first"), False, first=True)]
    register(hooks, handles)
    module(torch.ones(1))
    assert order == ["first", "user", "ours"]


def test_a_failure_leaves_no_handle_unknown() -> None:
    module, handles = nn.Identity(), list[RemovableHandle]()
    broken: Any = Hook(None, on_input(print), True)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        register([Hook(module, on_input(print), True), broken], handles)
    assert len(handles) == 1
    handles[0].remove()
    assert not module._forward_pre_hooks
