"""Models whose units let go of their weights, in one process: families, adapters, compiled ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from softtrace import DensityLoss, attach
from softtrace.model.sharding import as_it_was
from softtrace.tracing.instrument import attached
from tests.support.tiny import (
    FORWARD_ALONE,
    checkpointed,
    tiny_model,
    tiny_prompt,
    wrapped_to_checkpoint,
)
from tests.support.units import flat
from tests.support.ways_to_shard import WRAPPERS, one_process_group
from tests.support.zoo import VERIFIED, tiny

pytestmark = pytest.mark.thorough

OPTIONS: dict[str, Any] = {
    "share": 1.0, "masks": "soft", "size_weight": 0.3, "exits": 0.5, "exit_tokens": 0.5,
}  # fmt: skip
#: tied weights and Conv1D, a norm after sub-blocks, attention at its softmax, parallel, experts,
#: multipliers (where what a layer gives is replaced)
FAMILIES = ("gpt2", "gemma2", "bloom", "cohere", "mixtral", "granite")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with one_process_group():
        yield


def sharded(model: Any) -> Any:
    """Every layer a unit that lets go of its weights; what is left is one, also around adapters."""
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len):
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model)
    return model


def step(
    model: nn.Module, density: DensityLoss, number: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Term, and gradients of the loss with it."""
    ids = tiny_prompt(9, seed=1, batch=3)
    with density.watching(model, number) as watched:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    term = density(ids, labels=ids, step=number, watched=watched)
    assert term.exit_distance is not None
    (loss + term.loss).backward()
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            part: Any = weight.grad
            name = WRAPPERS.sub("", name)
            found[name] = part.full_tensor() if hasattr(part, "full_tensor") else part
    return term.loss.detach(), found


def check_same(whole: nn.Module, parts: nn.Module) -> None:
    wanted = step(whole, DensityLoss(whole, **OPTIONS))
    found = step(parts, DensityLoss(parts, **OPTIONS))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def flattened(model: Any) -> Any:
    """By FSDP1, which leaves weights whole where one process has them all, as views of one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return flat(model, *{type(layer) for layer in max(lists, key=len)})


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("way", [sharded, flattened])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, way: Callable[[Any], Any]) -> None:
    kind, changes = VERIFIED[name]
    check_same(tiny(kind, **changes).eval(), way(tiny(kind, **changes).eval()))


def test_on_gpus_masked_runs_come_as_seldom_as_where_they_are_not_captured() -> None:
    model, gpu = tiny_model("llama"), torch.device("cuda")
    density = DensityLoss(model)
    assert density.options_of_a_step(gpu).every == 2
    sharded(model)
    assert density.options_of_a_step(gpu).every == 8


@pytest.mark.parametrize("attached_first", [True, False])
def test_nothing_keeps_a_model_that_was_attached(attached_first: bool) -> None:
    model = tiny_model("llama", seed=1).train()
    if attached_first:
        attach(model)
    sharded(model)
    step(model, DensityLoss(model, **OPTIONS))
    twin, own = as_it_was(model), attach(model)
    assert attached(model) is own
    assert attached(twin) is None
    reference = weakref.ref(model)
    del model, own, twin
    gc.collect()  # units of FSDP2 refer to each other in a circle
    assert reference() is None


@pytest.mark.parametrize("attached_first", [True, False])
def test_adapters_whose_unit_is_around_the_model(attached_first: bool) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        model: nn.Module = get_peft_model(tiny_model("llama", seed=1).train(), config)  # type: ignore[arg-type]
        return model

    whole, parts = adapted(), adapted()
    if attached_first:
        DensityLoss(parts, **OPTIONS)
    check_same(whole, sharded(parts))


def compiled_first(model: Any) -> Any:
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return sharded(model)


def sharded_first(model: Any) -> Any:
    sharded(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def wrapped_and_compiled(model: Any) -> Any:
    """In the order of torchtitan: checkpointed, compiled, sharded."""
    return compiled_first(wrapped_to_checkpoint(model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "way",
    [
        compiled_first,
        sharded_first,
        lambda model: compiled_first(checkpointed(model)),
        *([lambda model: sharded_first(checkpointed(model))] if FORWARD_ALONE else []),
        wrapped_and_compiled,
    ],
)
def test_layers_that_are_compiled_and_sharded(way: Callable[[Any], Any]) -> None:
    whole, parts = (tiny_model("llama", seed=1).train() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    parts = way(parts)
    check_same(whole, parts)
    assert graphs() == (1, 0)  # of all layers
    density = DensityLoss(parts, **OPTIONS)
    for number in range(1, 3):
        step(parts, density, number)
    assert graphs() == (1, 0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "prepared", [lambda model: model, *([checkpointed] if FORWARD_ALONE else [])]
)
def test_a_model_that_is_sharded_and_compiled_as_a_whole(prepared: Callable[[Any], Any]) -> None:
    """FSDP2 itself breaks the graph where it gathers; the term adds no break and no graph."""
    made = []
    for watched in (False, True):
        whole, parts = (tiny_model("llama", seed=1).train() for _ in range(2))
        torch._dynamo.reset()
        counters.clear()
        parts = sharded(prepared(parts))
        parts.compile(backend="eager")
        if watched:
            check_same(whole, parts)
        for number in range(1, 3):
            if watched:
                step(parts, DensityLoss(parts, **OPTIONS), number)
            else:
                ids = tiny_prompt(9, seed=1, batch=3)
                parts(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        made.append(graphs())
    assert made[0] == made[1]
    assert made[1][0] > made[1][1] > 0
    torch._dynamo.reset()


def graphs() -> tuple[int, int]:
    """How many graphs were made, and how often one broke."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_wrapper_of_fsdp1_that_is_compiled() -> None:
    whole, parts = (tiny_model("llama", seed=1).train() for _ in range(2))
    check_same(whole, torch.compile(flattened(parts), backend="eager"))
    torch._dynamo.reset()
