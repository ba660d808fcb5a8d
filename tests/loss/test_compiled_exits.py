"""Exits of forwards that are compiled: what is read, and that the graph stays one."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from softtrace import DensityLoss, attach
from softtrace.loss import compiled_exits
from tests.support.tiny import (
    FORWARD_ALONE,
    checkpointed,
    tiny_model,
    tiny_prompt,
    wrapped_to_checkpoint,
)

pytestmark = [
    pytest.mark.thorough,
    # of the compiler, where what enters a graph was computed by another one
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

OPTIONS: dict[str, Any] = {"share": 0.5, "crop": 6, "exits": 0.6, "exit_tokens": 0.5}
HOW = ("in place", "wrapped", "by layer")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, how: str) -> Any:
    """The model, compiled so far that its graph is made, and run as it is."""
    if how == "wrapped":
        return torch.compile(model, backend="eager")
    for module in model.model.layers if how == "by layer" else [model]:
        module.compile(backend="eager")
    return model


def step(model: nn.Module, density: DensityLoss, number: int) -> tuple[Tensor, Tensor]:
    """Loss and exits' distance of a watched step, with its backward pass."""
    ids = tiny_prompt(9, seed=number, batch=3)
    with density.watching(model, number) as watched:
        task = model(input_ids=ids, labels=ids, use_cache=False).loss
    term = density(ids, step=number, watched=watched)
    (task + term.loss).backward()
    assert term.exit_distance is not None
    return (task + term.loss).detach(), term.exit_distance


def steps(model: Any, runs: Any, density: DensityLoss) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    found = [step(runs, density, number) for number in range(2)]
    return found, [weight.grad for weight in model.parameters()]


def graphs() -> tuple[int, int]:
    """How many graphs were made, and how often one broke."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("how", HOW)
def test_exits_are_read_without_a_break_or_another_graph(how: str) -> None:
    plain = tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()
    wanted = steps(plain, plain, DensityLoss(plain, **OPTIONS))
    model = tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()
    if how == "in place":  # the others are compiled first
        attach(model)
    runs = compiled(model, how)
    assert graphs() == (0, 0)
    found = steps(model, runs, DensityLoss(runs, **OPTIONS))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    # Layers of one class are one graph; the term's own runs are never compiled.
    assert graphs() == (1, 0)


@pytest.mark.parametrize(
    ("before", "how"),
    [
        ("it", "in place"),
        ("it", "by layer"),
        ("another of its class", "in place"),
        ("another of its class", "wrapped"),
    ],
)
def test_exits_are_read_in_a_forward_that_was_compiled_before(how: str, before: str) -> None:
    def tiny() -> Any:
        return tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()

    plain, model = tiny(), tiny()
    wanted = steps(plain, plain, DensityLoss(plain, **OPTIONS))
    other = tiny() if before == "another of its class" else model
    runs, ids = compiled(model, how), tiny_prompt(9, batch=3)
    (runs if other is model else compiled(other, how))(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(
        steps(model, runs, DensityLoss(runs, **OPTIONS)), wanted, atol=1e-12, rtol=0
    )
    assert graphs() == (1 if how == "by layer" else 2, 0)
    assert copy.deepcopy(model)(input_ids=ids).logits.equal(model(input_ids=ids).logits)


def test_a_first_step_without_exits_costs_no_other_graph() -> None:
    model = tiny_model("llama", seed=1, num_hidden_layers=2).train()
    density = DensityLoss(model, **OPTIONS, exit_every=2)
    model, read = compiled(model, "in place"), []
    for number in range(4):
        ids = tiny_prompt(9, seed=number, batch=3)
        with density.watching(step=number) as watched:
            task = model(input_ids=ids, labels=ids, use_cache=False).loss
        term = density(ids, step=number, watched=watched)
        (task + term.loss).backward()
        read.append(term.exit_distance is not None)
    assert read == [False, True, False, True]
    assert graphs() == (1, 0)


def test_a_forward_without_gradients_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(tiny_model("llama", num_hidden_layers=2).train(), "in place")
    ids = tiny_prompt(9, batch=3)
    density = DensityLoss(model, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with density.watching() as watched, torch.no_grad():
                model(input_ids=ids, use_cache=False)
            assert density(ids, watched=watched).exit_distance is None
    said = [record.message for record in caplog.records if record.name.startswith("softtrace")]
    assert len(said) == 2
    assert "torch.compiler.reset()" in said[0]


@pytest.mark.parametrize(
    ("way", "how"),
    [
        *([(checkpointed, "in place"), (checkpointed, "by layer")] if FORWARD_ALONE else []),
        (wrapped_to_checkpoint, "wrapped"),
        (wrapped_to_checkpoint, "by layer"),
    ],
)
def test_exits_are_read_where_layers_run_again_in_the_backward_pass(way: Any, how: str) -> None:
    def tiny() -> Any:
        return tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()

    plain, model = tiny(), way(tiny())
    wanted = steps(plain, plain, DensityLoss(plain, **OPTIONS))
    runs = compiled(model, how)
    found = steps(model, runs, DensityLoss(runs, **OPTIONS))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert graphs() == (1, 0)


def test_where_layers_are_checkpointed_with_their_hooks_no_exit_is_read_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers before 5.23."""
    monkeypatch.setattr(compiled_exits, "outside_of_checkpoint", lambda layer, modules: None)
    model = checkpointed(tiny_model("llama", num_hidden_layers=2).train())
    density, runs = DensityLoss(model, **OPTIONS), compiled(model, "in place")
    with caplog.at_level(logging.WARNING):
        assert unread(runs, density, 0)
    assert "exits: compiled and checkpointed with hooks, so none is read" in caplog.messages


def unread(model: nn.Module, density: DensityLoss, number: int) -> bool:
    """Whether no exit is read in a watched step."""
    ids = tiny_prompt(9, seed=number, batch=3)
    with density.watching(model, number) as watched:
        model(input_ids=ids, labels=ids, use_cache=False)
    return density(ids, step=number, watched=watched).exit_distance is None


@pytest.mark.parametrize("how", HOW)
def test_changing_between_checkpointed_and_not_adds_hooks_and_graphs_once(how: str) -> None:
    plain = tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()
    model = tiny_model("llama", seed=1, dtype=torch.float64, num_hidden_layers=2).train()
    runs = compiled(model, how)
    density = {each: DensityLoss(each, **OPTIONS) for each in (plain, runs)}
    hooks, made = [], []
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number in range(6):
        for module in (*plain.modules(), *model.modules()):
            if hasattr(module, "gradient_checkpointing"):  # another call would be another graph
                module.gradient_checkpointing = bool(number % 2)
        if number % 2 and not FORWARD_ALONE:
            assert unread(runs, density[runs], number)
            continue
        found = step(runs, density[runs], number)
        torch.testing.assert_close(found, step(plain, density[plain], number), atol=1e-12, rtol=0)
        hooks.append(sum(len(each._forward_pre_hooks) for each in model.modules()))
        made.append(graphs())
    assert len(set(hooks)) == 1
    assert len(set(made[1:])) == 1
    assert made[-1][1] == 0 or not FORWARD_ALONE


def test_layers_that_are_compiled_once_more_are_read() -> None:
    model = compiled(tiny_model("llama", num_hidden_layers=2).train(), "by layer")
    density = DensityLoss(model, **OPTIONS)
    step(model, density, 0)
    compiled(model, "by layer")
    step(model, density, 1)


@pytest.mark.parametrize("how", HOW)
def test_a_loss_that_was_dropped_keeps_nothing_and_leaves_its_hooks_to_the_next(how: str) -> None:
    plain = tiny_model("llama", seed=1, num_hidden_layers=2).train()
    wanted = steps(plain, plain, DensityLoss(plain, **OPTIONS))[0]
    model = tiny_model("llama", seed=1, num_hidden_layers=2).train()
    runs = compiled(model, how)
    found, ids = [], tiny_prompt(9, batch=3)
    for number in (0, 1):
        density = DensityLoss(runs, **OPTIONS)
        found.append(step(runs, density, number))
        noted = list(density._streams._every.values())
        del density
        gc.collect()
        runs(input_ids=ids, use_cache=False)
        assert [each.stream for each in noted] == [None, None]
    torch.testing.assert_close(found, wanted)
    assert graphs()[0] == (1 if how == "by layer" else 2)  # with what is noted, and without


def test_two_losses_on_one_model_that_is_compiled_by_layer_wrap_it_once_each() -> None:
    model = compiled(tiny_model("llama", num_hidden_layers=2).train(), "by layer")
    losses = [DensityLoss(model, **OPTIONS) for _ in range(2)]
    calls = set()
    for number in range(4):
        step(model, losses[number % 2], number)
        calls.add(model.model.layers[1]._compiled_call_impl)
    assert len(calls) == 2


def test_layers_that_are_checkpointed_with_their_hooks_are_not_watched(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled(checkpointed(tiny_model("llama", num_hidden_layers=2).train()), "in place")
    density = DensityLoss(model, **OPTIONS)
    # As older releases of transformers have it.
    call = nn.Module.__call__
    monkeypatch.setattr(type(model.model.layers[0]), "__call__", lambda *a, **k: call(*a, **k))
    with caplog.at_level(logging.WARNING), density.watching() as watched:
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert "compiled and checkpointed" in caplog.text
    assert not watched.forwards


def test_a_forward_that_fails_leaves_nothing_held() -> None:
    model = tiny_model("llama", num_hidden_layers=2).train()
    runs, ids = compiled(model, "in place"), tiny_prompt(9, batch=2)
    density = DensityLoss(runs, **OPTIONS)
    held: list[weakref.ref[Tensor]] = []

    def forward() -> None:
        with density.watching():
            states = runs(input_ids=ids, output_hidden_states=True).hidden_states
            held.append(weakref.ref(states[1]))
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        forward()
    gc.collect()
    assert held[0]() is None
