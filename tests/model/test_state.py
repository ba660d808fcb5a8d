"""The state in which a model runs."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from softtrace.model.state import (
    all_modules,
    dropout_off,
    is_compiled,
    is_reentrant,
    uncheckpointed,
)
from tests.support.tiny import tiny_model, wrapped_to_checkpoint


def _twice() -> nn.Module:
    """A module that holds one child under two names, and a name without a child."""
    shared, holder = nn.Linear(2, 2), nn.Module()
    holder.one = nn.Sequential(shared, nn.Dropout())
    holder.other = shared
    holder.register_module("nothing", None)
    return holder


def test_all_modules_are_those_of_modules() -> None:
    for model in (_twice(), tiny_model("llama")):
        found = all_modules(model)
        assert {id(module) for module in found} == {id(module) for module in model.modules()}
        assert len(found) == len(set(map(id, found)))


def test_several_models_are_walked_once_where_they_overlap() -> None:
    model = _twice()
    assert len(all_modules(model, model.one)) == len(all_modules(model)) == 4
    assert len(all_modules(model.one, nn.ReLU())) == 4


def test_every_module_gets_its_own_flag_back() -> None:
    model = _twice()
    model.one.eval()
    model.one[1].train()
    before = [module.training for module in model.modules()]
    with dropout_off(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with suppress(KeyError), dropout_off(model):
        raise KeyError
    assert [module.training for module in model.modules()] == before


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what the compiler imports warns of
def test_compiled_in_place_or_inside_a_wrapper_is_seen() -> None:
    model = _twice()
    assert not is_compiled(all_modules(model))
    holder = nn.Sequential(nn.ReLU(), torch.compile(model))
    assert is_compiled(all_modules(holder))
    model.one[0].compile()
    assert is_compiled(all_modules(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the reentrant way is on its way out
def test_reentrant_checkpointing_is_seen() -> None:
    model = tiny_model("llama")
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert is_reentrant(all_modules(model)) == reentrant
    model.gradient_checkpointing_disable()
    assert not is_reentrant(all_modules(model))


def test_layers_are_checkpointed_again_after_a_run_of_ours() -> None:
    model = wrapped_to_checkpoint(tiny_model("llama"))
    before = [layer.checkpoint_fn for layer in model.model.layers]
    with suppress(KeyError), uncheckpointed(model):
        assert not any(layer.checkpoint_fn in before for layer in model.model.layers)
        raise KeyError
    assert [layer.checkpoint_fn for layer in model.model.layers] == before
