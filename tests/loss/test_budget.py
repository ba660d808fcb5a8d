"""The strength that follows the held-out loss, against a loss that answers late and is noisy."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from typing import Any

import pytest

from softtrace.errors import InvalidInputError
from softtrace.loss import budget as budget_module
from softtrace.loss.budget import CHANGE, FACTOR, GAIN, LossBudget

BUDGET, EVERY = 0.01, 50
PLAIN = {step: 2.0 + math.exp(-step / 300) for step in range(0, 4001, 100)}


def training(
    spent_at_first: float, lag: float, noise: float = 0.2, count: int = 20, seed: int = 0
) -> list[tuple[float, float]]:
    """Share of the budget that is spent, and the factor, after each measurement of a toy training.

    Args:
        spent_at_first: share that the strength would spend in the end with a factor of 1.
        lag: measurements in which the loss goes by 1 - 1/e of the way to where the strength pulls
            it, at the full learning rate, which falls to 0 as a cosine.
        noise: standard deviation of a measurement, shares of the budget.
        count: of measurements.
        seed: of the noise.
    """
    drawn, budget, spent, found = random.Random(seed), LossBudget(BUDGET, PLAIN), 0.0, []
    for number in range(count):
        rate = 0.5 * (1 + math.cos(math.pi * number / count))
        spent += (1 - math.exp(-rate / lag)) * (spent_at_first * budget.factor - spent)
        step = (number + 1) * EVERY
        seen = spent + drawn.gauss(0, noise)
        budget.update(step, budget.reference_at(step) * (1 + BUDGET * seen))
        found.append((spent, budget.factor))
    return found


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("spent_at_first", [0.2, 1, 5, 10])
def test_it_ends_at_the_budget_from_too_weak_and_from_too_strong(
    spent_at_first: float, lag: float
) -> None:
    for seed in range(10):
        found = training(spent_at_first, lag, seed=seed)
        assert 0.6 < found[-1][0] < 1.25, seed
        if spent_at_first <= 1:  # it never costs much more on its way
            assert max(spent for spent, _ in found) < 1.5, seed


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("spent_at_first", [0.2, 1, 10])
def test_it_does_not_swing(spent_at_first: float, lag: float) -> None:
    found = [spent for spent, _ in training(spent_at_first, lag, noise=0.0, count=40)]
    across = sum((one > 1) != (two > 1) for one, two in pairwise(found) if abs(two - 1) > 0.03)
    assert across <= 2
    assert found[-1] == pytest.approx(1, abs=0.05)
    assert training(spent_at_first, lag) == training(spent_at_first, lag)  # no luck in it


def test_a_strength_that_costs_more_and_more_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on SmolLM2-135M, where the loss answers to about the cube root of the strength."""

    def spent_at_the_end() -> float:
        budget, spent = LossBudget(BUDGET, PLAIN), 0.0
        for number in range(25):
            spent += 0.3 * (0.9 * (1 + 0.02 * number) * budget.factor**0.3 - spent)
            step = (number + 1) * EVERY
            budget.update(step, budget.reference_at(step) * (1 + BUDGET * spent))
        return spent

    assert spent_at_the_end() < 1.06
    monkeypatch.setattr(budget_module, "GAIN_ABOVE", GAIN)
    assert spent_at_the_end() > 1.08


def test_without_looking_ahead_it_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trend is for: the budget is passed by more if a late answer is waited for."""
    ahead = max(spent for spent, _ in training(1, 3, noise=0.0))

    def forgets(self: LossBudget, step: int, loss: float) -> None:
        self.spent = (loss / self.reference_at(step) - 1) / self.budget
        update(self, step, loss)

    update = LossBudget.update
    monkeypatch.setattr(LossBudget, "update", forgets)
    assert max(spent for spent, _ in training(1, 3, noise=0.0)) > ahead + 0.1


def measured(*spent: float, start: int = 0, first_step: int = 1) -> list[float]:
    """The factor after measurements that found these shares of the budget spent."""
    budget, found = LossBudget(BUDGET, {0: 2.0}, start), []
    for step, each in enumerate(spent, first_step):
        budget.update(step, 2.0 * (1 + BUDGET * each))
        found.append(budget.factor)
    return found


def test_changes_and_the_factor_have_bounds() -> None:
    low, high = CHANGE
    assert measured(1.0)[0] < 1  # at this trend the next is at 2
    assert measured(0.5, 0.75, 1.0)[1:] == pytest.approx([1, math.exp(-0.25)])
    assert measured(1e9) == [low]
    assert measured(-1e9) == [high]
    assert measured(*(100.0**n for n in range(1, 30)))[-1] == FACTOR[0]
    assert measured(*(-(100.0**n) for n in range(1, 30)))[-1] == FACTOR[1]


def test_a_measurement_that_is_not_finite_changes_nothing() -> None:
    for value in (math.nan, math.inf):
        assert measured(0.5, value, 0.75, 1.0) == pytest.approx(
            [1, 1, 1, math.exp(-0.25)], rel=1e-9
        )


def test_until_the_term_has_its_whole_strength_the_factor_stays() -> None:
    assert measured(0.0, 0.0, 0.0, start=3) == [1, 1, 1]
    assert measured(0.0, 0.0, 0.0, 0.0, start=3) == pytest.approx([1, 1, 1, math.exp(0.5)])


def test_the_reference_is_linear_between_its_steps_and_constant_outside() -> None:
    budget = LossBudget(0.01, {200: 2.0, 100: 3.0})  # in any order
    found = [budget.reference_at(step) for step in (0, 100, 150, 175, 200, 10**6)]
    assert found == pytest.approx([3, 3, 2.5, 2.25, 2, 2])


def test_it_goes_on_from_its_state() -> None:
    first, second = LossBudget(BUDGET, PLAIN), LossBudget(BUDGET, PLAIN)
    second.load(json.loads(json.dumps(first.state())))  # before any measurement
    for step, loss in ((100, 2.7), (200, 2.53)):
        first.update(step, loss)
    second.load(json.loads(json.dumps(first.state())))
    for budget in (first, second):
        budget.update(300, 2.37)
    assert first.state() == second.state()
    fresh = LossBudget(BUDGET, PLAIN)
    fresh.update(300, 2.37)
    assert fresh.state() != first.state()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({}, "found {}, allowed are losses; run once with strength 0"),
        ([2.0], r"found \[2.0\], allowed are losses"),
        ({-1: 2.0}, "a step: found -1, allowed are integers from 0"),
        ({0.5: 2.0}, "a step: found 0.5, allowed are integers"),
        ({0: 0.0}, r"the loss at step 0: found 0.0, allowed \(0, inf\)"),
        ({0: math.nan}, "the loss at step 0: found nan"),
        ({0: "2"}, "the loss at step 0: found '2'"),
    ],
)
def test_references_that_are_none_are_refused(reference: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^reference.* {message}|^reference: {message}"):
        LossBudget(0.01, reference)


def test_a_reference_of_another_training_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    held = LossBudget(BUDGET, PLAIN)
    for step in range(EVERY, 20 * EVERY, EVERY):
        held.update(step, held.reference_at(step) * 1.15)  # whatever the strength is
    assert held.factor == FACTOR[0]
    (said,) = caplog.messages
    assert said.startswith("budget: at step 300 the held-out loss lies 15.0 % above the reference")
    assert "fell to 1/64" in said


def test_a_strength_that_brings_the_loss_back_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    for spent_at_first in (0.2, 1, 10):
        training(spent_at_first, lag=3)
    assert not caplog.messages


def test_one_measurement_over_the_budget_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    held = LossBudget(BUDGET, PLAIN)
    held.load({"factor": FACTOR[0], "spent": 0.9})
    held.update(EVERY, held.reference_at(EVERY) * (1 + 10 * BUDGET))
    assert held.factor == FACTOR[0]
    assert not caplog.messages
