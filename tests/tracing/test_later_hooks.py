"""Hooks that are added after a model was attached: noticed where they change what it says."""

from __future__ import annotations

import functools
import gc
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softtrace
from softtrace import UnsupportedModelError
from softtrace.tracing import attach as attaching
from softtrace.tracing.later_hooks import hooks_of
from tests.support.tiny import tiny_model, tiny_prompt


def more(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output + 0.5
    return (output[0] + 0.5, *output[1:])


def mixed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + output.mean(1, keepdim=True)


def before(module: nn.Module, args: Any) -> Any:
    return (args[0] + args[0].mean(1, keepdim=True), *args[1:])


@pytest.mark.parametrize(
    ("where", "hook"),
    [
        ("model.layers.1", more),
        ("model.layers.1", functools.partial(more)),
        ("model.layers.1.self_attn.o_proj", more),
        ("model.layers.1.mlp.down_proj", mixed),
    ],
)
def test_a_hook_that_changes_what_edges_are_is_refused(where: str, hook: Any) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    found = softtrace.density_curve(model, ids)
    handle = model.get_submodule(where).register_forward_hook(hook)
    for measure in (softtrace.density_curve, softtrace.edge_importance):
        with pytest.raises(UnsupportedModelError, match=f"found hooks on {where} .*remove them"):
            measure(model, ids)
    with pytest.raises(UnsupportedModelError, match="found hooks on"):
        softtrace.DensityLoss(model, strength=1.0)(ids, None)
    handle.remove()
    again = softtrace.density_curve(model, ids)
    assert torch.equal(again.total_variation, found.total_variation)


def test_a_hook_before_a_module_is_noticed_too() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    softtrace.attach(model)
    model.model.layers[0].mlp.register_forward_pre_hook(before)  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModelError, match=r"found hooks on model\.layers\.0\.mlp that"):
        softtrace.edge_importance(model, ids)


def test_a_hook_that_leaves_a_sum_of_edges_is_proven_anew() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    first = softtrace.attach(model)
    mlp: nn.Module = model.model.layers[1].mlp  # type: ignore[union-attr, index, assignment]
    mlp.register_forward_hook(more)
    second = softtrace.attach(model)
    assert second is not first
    assert softtrace.attach(model) is second
    found = softtrace.edge_importance(model, ids).layers[1].mlp
    fresh = tiny_model("llama")
    fresh.model.layers[1].mlp.register_forward_hook(more)  # type: ignore[union-attr, index]
    assert torch.equal(found, softtrace.edge_importance(fresh, ids).layers[1].mlp)


def test_a_hook_that_only_looks_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("llama"), []
    first = softtrace.attach(model)
    proofs: list[int] = []
    monkeypatch.setattr(attaching, "prove", lambda *_: proofs.append(1))
    layer: nn.Module = model.model.layers[1]  # type: ignore[union-attr, index, assignment]
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    assert softtrace.attach(model) is first
    assert len(seen) == 1  # one run with it, and one without
    assert softtrace.attach(model) is first
    assert len(seen) == 1
    handle.remove()
    assert softtrace.attach(model) is first
    assert not proofs


def test_hooks_stay_where_they_were() -> None:
    """Taken away for a run and put back: their order, and their handles, are as before."""
    model, order = tiny_model("llama"), []
    layer: nn.Module = model.model.layers[1]  # type: ignore[union-attr, index, assignment]
    layer.register_forward_hook(lambda *_: order.append("first"))
    softtrace.attach(model)
    handle = layer.register_forward_hook(lambda *_: order.append("second"), prepend=True)
    softtrace.attach(model)
    order.clear()
    model(input_ids=tiny_prompt(4))
    assert order == ["second", "first"]
    assert len(hooks_of(model.modules())) == 2
    handle.remove()
    assert len(hooks_of(model.modules())) == 1


def test_our_own_hooks_and_those_of_transformers_are_not_asked_about() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    first = softtrace.attach(model)
    model(input_ids=ids, output_hidden_states=True)  # transformers leaves hooks that only look
    assert any(module._forward_hooks for module in model.modules())
    loss = softtrace.DensityLoss(model, strength=1.0)
    with loss.watching():
        model(input_ids=ids)
        assert not hooks_of(model.modules())
    assert softtrace.attach(model) is first


def test_what_a_hook_makes_of_the_whole_output_is_no_edges() -> None:
    """In training kernels that fuse head and loss give no logits."""
    model, seen = tiny_model("llama"), []
    first = softtrace.attach(model)
    model.register_forward_hook(lambda *_: {"loss": torch.zeros(())})
    assert softtrace.attach(model) is first
    layer: nn.Module = model.model.layers[1]  # type: ignore[union-attr, index, assignment]
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert softtrace.attach(model) is first
    assert seen == [1]


def test_a_hook_that_fails_on_a_tiny_batch_is_left_to_fail_where_it_is_meant_to_run() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    first = softtrace.attach(model)

    def of_one_row(module: nn.Module, args: Any, output: Any) -> None:
        if len(args[0]) > 1:
            raise ValueError("one row alone")

    model.model.layers[1].register_forward_hook(of_one_row)  # type: ignore[union-attr, index]
    assert softtrace.attach(model) is first
    softtrace.edge_importance(model, ids)
    with pytest.raises(ValueError, match="one row alone"):
        softtrace.edge_importance(model, tiny_prompt(6, batch=2))


def twice(module: nn.Module) -> Any:
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = own(*[each for each in args if each is not module], **kwargs)
        return 2 * found if isinstance(found, Tensor) else (2 * found[0], *found[1:])

    return forward


def test_a_forward_that_is_replaced_is_noticed() -> None:
    """As libraries patch the modules of a model that is there already."""
    model, ids = tiny_model("llama"), tiny_prompt(6)
    first = softtrace.attach(model)
    layer: Any = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.mlp.forward = MethodType(twice(layer.mlp), layer.mlp)
    second = softtrace.attach(model)
    assert second is not first
    layer.mlp.forward = MethodType(layer.mlp.forward.__func__, layer.mlp)
    assert softtrace.attach(model) is second
    for each in (layer, layer.self_attn):
        each.forward = twice(each)
        with pytest.raises(UnsupportedModelError, match="layer 1"):
            softtrace.edge_importance(model, ids)
        del each.forward
    assert softtrace.attach(model).forwards[0]() == layer.mlp.forward
    gone = weakref.ref(model)
    del model, layer, each, first, second
    gc.collect()
    assert gone() is None
