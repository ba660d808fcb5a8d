"""Maps of exits are learned apart from the model: their gradients, their steps, their state."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch

from softtrace import DensityLoss, TrainerSetupError
from softtrace.loss.learned_maps import LearnedMaps
from softtrace.model.exit_maps import exit_maps_of, set_exit_maps
from tests.support.skips import cuda
from tests.support.tiny import tiny_model, tiny_prompt

OPTIONS: dict[str, Any] = {
    "strength": 0.7, "exits": 0.4, "exit_tokens": 1.0, "exit_quantile": 1.0,
    "exit_depths": (0.5, 0.5), "exit_map": True, "every": 10**6, "start_step": 0,
}  # fmt: skip
NAME = "after_layer_2"


def model_of(**changes: Any) -> Any:
    return tiny_model("llama", seed=4, num_hidden_layers=4, **changes).train()


def watched_term(density: DensityLoss, ids: torch.Tensor, **place: int) -> Any:
    with density.watching() as watched:
        task = density.model(input_ids=ids, labels=ids).loss
    return task, density(ids, watched=watched, **place)


def kl_of_exit(model: Any, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean KL of the exit after two layers, of every token."""
    output = model(input_ids=ids, output_hidden_states=True)
    hidden = output.hidden_states[2]
    read = model.lm_head(model.model.norm(hidden + hidden @ weight.T))
    p, q = output.logits.detach().log_softmax(-1), read.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_gradients_that_are_there_already_reach_their_own_map_alone() -> None:
    model = model_of()
    density = DensityLoss(model, **{**OPTIONS, "exit_depths": (0.25, 0.75)})
    maps = density.exit_maps
    assert maps is not None
    known = torch.full((maps.maps.weights[NAME].shape), 2.0)
    for _ in range(2):  # batches that are accumulated
        maps.collect(torch.device("cpu"), torch.tensor(1.0), {NAME: known})
    gradients = {name: each.grad for name, each in maps.maps.weights.items()}
    assert len(gradients) == 3
    for name, gradient in gradients.items():
        assert gradient is not None
        assert gradient.unique().tolist() == [4.0 if name == NAME else 0.0]


def test_gradients_that_are_not_finite_count_as_nothing() -> None:
    maps = LearnedMaps(model_of(), range(2, 3), 32)
    own = maps.maps.weights[NAME]
    for value in (torch.nan, torch.inf, -torch.inf, 3.0):
        maps.collect(torch.device("cpu"), torch.tensor(1.0), {NAME: torch.full_like(own, value)})
    assert own.grad is not None
    assert own.grad.unique().tolist() == [3.0]


def test_a_batch_that_failed_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit was read, after another number of layers, and its masked run ran out of memory."""
    model, ids = model_of(), tiny_prompt(7)
    for seed in range(4):  # of some the two exits, of a token each, are different ones
        options = {**OPTIONS, "exit_depths": (0.25, 0.75), "exit_tokens": 0.01, "seed": seed}
        density = DensityLoss(model, **options)
        with monkeypatch.context() as patch:
            patch.setattr(density, "_density", mock.Mock(side_effect=torch.OutOfMemoryError))
            with pytest.raises(torch.OutOfMemoryError):
                watched_term(density, ids, step=0)
        assert watched_term(density, ids, step=1)[1].exit_distance is not None


def test_a_map_follows_the_gradient_of_the_distance_and_the_model_that_of_its_weight() -> None:
    model, ids = model_of(dtype=torch.float64), tiny_prompt(7, batch=2)
    density = DensityLoss(model, **OPTIONS)
    assert density.exit_maps is not None
    own = density.exit_maps.maps.weights[NAME]
    torch.nn.init.normal_(own, std=0.1)
    weight = own.detach().double().requires_grad_()
    wanted = kl_of_exit(model, ids, weight)
    (of_map,) = torch.autograd.grad(wanted, weight, retain_graph=True)
    of_model = torch.autograd.grad(0.7 * 0.4 * wanted, model.model.layers[0].mlp.up_proj.weight)
    # Off the steps with masked runs: the exits alone.
    _, term = watched_term(density, ids, step=1)
    torch.testing.assert_close(term.exit_distance.item(), wanted.item(), rtol=1e-6, atol=0)
    torch.testing.assert_close(own.grad.double(), of_map, rtol=1e-5, atol=1e-9)
    found = torch.autograd.grad(term.loss, model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(found[0], of_model[0], rtol=1e-6, atol=1e-12)


def test_without_a_weight_the_map_learns_and_the_model_does_not() -> None:
    model, ids = model_of(), tiny_prompt(12, batch=4)
    density = DensityLoss(model, **{**OPTIONS, "exits": 0.0})
    distances = []
    for step in range(1, 60):
        _, term = watched_term(density, ids, step=step)
        assert not term.loss.requires_grad
        distances.append(term.exit_distance.item())
    assert distances[-1] < 0.7 * distances[0]
    assert all(each.grad is None for each in model.parameters())


def test_accumulated_batches_are_read_through_one_map() -> None:
    model, ids = model_of(), tiny_prompt(7, batch=2)
    density = DensityLoss(model, **OPTIONS)
    assert density.exit_maps is not None
    own = density.exit_maps.maps.weights[NAME]
    gradients = []
    for micro_step in range(2):
        watched_term(density, ids, step=1, micro_step=micro_step)
        assert not own.any()
        gradients.append(own.grad.clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    watched_term(density, ids, step=2)
    assert own.any()
    torch.testing.assert_close(own, -1e-3 * gradients[1].sign(), rtol=0.01, atol=1e-5)


def test_a_batch_that_is_not_watched_or_not_finite_moves_nothing() -> None:
    model, ids = model_of(), tiny_prompt(7, batch=2)
    density = DensityLoss(model, **OPTIONS, on_nonfinite="skip")
    assert density.exit_maps is not None
    density(ids, step=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.nan)
    watched_term(density, ids, step=2)
    density(ids, step=3)
    assert not density.exit_maps.maps.weights[NAME].any()


def test_a_state_goes_on_as_if_nothing_had_been() -> None:
    ids, runs = tiny_prompt(7, batch=2), []
    for interrupted in (False, True):
        model = model_of()
        density = DensityLoss(model, **OPTIONS)
        for step in range(1, 6):
            if interrupted and step == 3:
                assert density.exit_maps is not None
                state = copy.deepcopy(density.exit_maps.state())
                assert f"{NAME}.grad" in state  # of the step before, which is not taken yet
                set_exit_maps(model, None)
                density = DensityLoss(model, **OPTIONS)
                assert density.exit_maps is not None
                density.exit_maps.load(state)
            watched_term(density, ids, step=step)
        assert density.exit_maps is not None
        runs.append(density.exit_maps.maps.weights[NAME])
    assert torch.equal(*runs)


def test_maps_of_other_exits_are_refused() -> None:
    state = LearnedMaps(model_of(), range(1, 3), 32).state()
    learned = LearnedMaps(model_of(), range(2, 3), 32)
    with pytest.raises(TrainerSetupError, match="maps of exits after_layer_1, after_layer_2, this"):
        learned.load(state)


def test_what_a_model_has_learned_is_learned_on() -> None:
    model = model_of()
    first = LearnedMaps(model, range(2, 3), 32)
    assert LearnedMaps(model, range(2, 3), 32).maps is first.maps
    assert LearnedMaps(model, range(1, 3), 32).maps is not first.maps


@pytest.mark.parametrize("again", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_the_model_of_a_copy_is_read_through_the_maps_of_the_copy(again: Any) -> None:
    density, ids = DensityLoss(model_of(), **OPTIONS), tiny_prompt(7, batch=2)
    copied = again(density)
    assert copied.exit_maps.maps is not density.exit_maps.maps
    for step in (1, 2):
        watched_term(copied, ids, step=step)
    assert exit_maps_of(copied.model) is copied.exit_maps.maps
    assert exit_maps_of(copied.model).weights[NAME].any()
    assert not exit_maps_of(density.model).weights[NAME].any()


@cuda
def test_maps_learn_on_where_the_model_was_moved_to() -> None:
    model, ids = model_of(), tiny_prompt(7, batch=2)
    density = DensityLoss(model, **OPTIONS)
    for step in (1, 2, 3):
        if step == 3:
            model, ids = model.cuda(), ids.cuda()
            exit_maps_of(model)  # moves them too, and knows nothing of what learns them
        watched_term(density, ids, step=step)
    density.exit_maps.begin(4)
    assert density.exit_maps.maps.weights[NAME].is_cuda


def test_maps_that_no_process_read_are_added_up_where_the_batch_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = LearnedMaps(tiny_model("llama", num_hidden_layers=2), range(1, 2), 8, torch.float32)
    done: list[Any] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: done.append("added up"))
    monkeypatch.setattr(maps, "on", done.append)
    maps.collect(torch.device("cuda"), None)
    assert done == [torch.device("cuda"), "added up"]
