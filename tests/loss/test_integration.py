"""What is logged of the term, and what of it a checkpoint keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace import DensityOptions, TrainerSetupError
from softtrace.loss.budget import LossBudget
from softtrace.loss.integration import (
    STATE_VERSION,
    TermLog,
    check_state,
    measured_loss,
    state_of,
)
from softtrace.loss.term import DensityTerm

EVERY = 3
CPU = torch.device("cpu")


def terms(count: int, dtype: torch.dtype = torch.float32) -> list[DensityTerm]:
    """Terms of a training whose every third step has a masked run."""
    found = []
    for step in range(count):
        values = torch.rand(5, generator=torch.Generator().manual_seed(step), dtype=dtype).unbind()
        loss, distortion, size, share, distance = values
        if step % EVERY:
            found.append(DensityTerm.of_no_run(CPU))
        else:
            found.append(
                DensityTerm(loss, distortion, size, share, 0.5, exit_distance=distance.float())
            )
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1))
        and value.dtype == other[name].dtype
        for name, value in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", range(8))
def test_a_log_that_goes_on_logs_what_it_would_have(cut: int, dtype: torch.dtype) -> None:
    options = DensityOptions(every=EVERY)
    straight, first, second = (TermLog(options, EVERY) for _ in range(3))
    wanted = [straight.of(term) for term in terms(8, dtype)]
    found = [first.of(term) for term in terms(8, dtype)[:cut]]
    second.load(first.state(), CPU)
    found += [second.of(term) for term in terms(8, dtype)[cut:]]
    assert all(map(same, found, wanted))
    fresh = TermLog(options, EVERY)  # without the state the comparison would notice
    noticed = [not same(fresh.of(term), wanted[cut + at]) for at, term in enumerate(terms(8)[cut:])]
    assert cut in (0, 3, 6) or any(noticed)


def only_plain(value: Any) -> bool:
    """Whether something is made of tensors and primitives alone."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and only_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(only_plain, value))
    return value is None or isinstance(value, Tensor | int | float | str)


def test_the_state_is_plain_and_its_layout_has_a_version() -> None:
    log = TermLog(DensityOptions(every=EVERY), EVERY)
    for term in terms(2):
        log.of(term)
    state = state_of(3, log.state())
    assert only_plain(state)
    assert state["version"] == STATE_VERSION == 3
    nothing = {"version": 3, "seed": 3, "log": None, "budget": None}
    assert json.loads(json.dumps(state_of(3))) == nothing
    budget = LossBudget(0.01, {0: 2.0})
    assert json.loads(json.dumps(state_of(3, budget=budget)))["budget"] == budget.state()


def check(kept: dict[str, Any]) -> None:
    check_state(kept, 3, found="a density {name} of {value}", resumed="a run")


def test_older_states_are_read_and_others_refused() -> None:
    check({"version": 1, "seed": 3})  # which kept no log
    check({"version": 2, "seed": 3, "log": None})  # and this nothing of a budget
    check(state_of(3))
    for version in (0, 4, "1", None):
        with pytest.raises(
            TrainerSetupError, match=f"a density version of {version!r}, this run has 3"
        ):
            check({"version": version, "seed": 3})
    for older in (1, 2, 3):
        with pytest.raises(TrainerSetupError, match="a density seed of 4, this run has 3"):
            check({"version": older, "seed": 4})


def test_with_a_budget_its_strength_is_logged_and_without_one_nothing_of_it() -> None:
    options, budget = DensityOptions(strength=0.5), LossBudget(0.01, {0: 2.0})
    log = TermLog(options, budget=budget)
    (term,) = terms(1)
    first = log.of(term)
    assert first["density/strength"] == 0.5
    assert first["density/budget_spent"].isnan()
    budget.update(1, 2.0 * 1.005)
    then = log.of(term)
    assert float(then["density/strength"]) == pytest.approx(0.5 * budget.factor)
    assert float(then["density/budget_spent"]) == pytest.approx(0.5, rel=1e-3)
    plain = TermLog(options).of(term)
    assert plain.keys() == first.keys() - {"density/strength", "density/budget_spent"}


def test_a_validation_that_logs_no_such_loss_is_told_what_it_logs() -> None:
    assert measured_loss({"val_loss": torch.tensor(2.5)}, "val_loss") == 2.5
    with pytest.raises(TrainerSetupError, match="logged no loss/held_out, but val_loss; name the"):
        measured_loss({"val_loss": 2.5}, "loss/held_out")
    with pytest.raises(TrainerSetupError, match="logged no val_loss, but nothing;"):
        measured_loss({}, "val_loss")
