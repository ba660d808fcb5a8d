"""Costs of steps of fixed shapes, and the way to draft that is chosen by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace.decoding import StaticDecoder, check_early_exit
from softtrace.decoding.replay import Guesses
from softtrace.evaluation import fixed_costs as module
from softtrace.evaluation.fixed_costs import fixed_costs, fixed_drafting
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("fast", [False, True])  # no guess takes less than nothing, no run than one
def test_what_was_not_measured_lies_on_lines(
    most: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", seed=2, num_hidden_layers=4)
    decoder = StaticDecoder(model, exit_layer=2, draft_tokens=most, capacity=16, backend=None)
    guess, follow, token = (0.3, 0.4, 0.3) if fast else (0.6, 0.45, 0.7)
    seconds = {"plain": 1.0, "guess": guess, "follow": follow, "read": 0.0}
    clock = [0.0]

    def run(part: str, step: Any, *numbers: int) -> None:
        (count,) = numbers or (0,)
        clock[0] += seconds[step.__name__] + count * token

    monkeypatch.setattr(decoder._runner, "run", run)
    monkeypatch.setattr(module, "now", lambda like: clock[0])
    guesses, whole, head = fixed_costs(decoder, tiny_prompt(8)[0])
    assert head == pytest.approx(0.0 if fast else 0.15)
    assert guesses == pytest.approx({1: 0.0, 2: 0.3, 3: 0.65} if fast else {1: 0.4, 2: 0.6, 3: 0.8})
    lines = [1.0, 1.0, 1.0, 1.2, 1.5] if fast else [1.0, 1.4, 2.1, 2.8, 3.5]
    assert whole == pytest.approx(lines[:most])


def test_steps_can_be_timed_and_leave_texts_as_they_were() -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(8)[0]
    decoder = StaticDecoder(model, exit_layer=1, draft_tokens=3, capacity=16, backend=None)
    wanted = decoder.speculate([row], 8)[0].tokens
    guesses, whole, head = fixed_costs(decoder, row)
    assert all(cost >= 0 for cost in (head, *guesses.values()))
    assert len(whole) == 3
    assert torch.equal(decoder.speculate([row], 8)[0].tokens, wanted)


def test_a_way_is_chosen_by_these_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama", seed=2), [tiny_prompt(8)]
    # The second exit is always right; the first is right every other time.
    texts = [Guesses([[True, False] * 6, [True] * 12], [[1.0] * 12] * 2)]
    cheap = {1: 0.01, 2: 0.02}, [1.0, 1.0, 1.0, 1.0], 0.0
    dear = {1: 0.1, 2: 0.95}, [1.0, 2.0, 3.0, 4.0], 0.0
    for costs, layer, tokens in ((cheap, 2, 4), (dear, 1, 1)):
        monkeypatch.setattr(module, "fixed_costs", lambda *_, costs=costs: costs)
        found = fixed_drafting(model, check_early_exit(model), texts, rows, 4, None)
        assert (found.exit_layer, found.draft_tokens, found.confidence) == (layer, tokens, 0.0)
    asked = fixed_drafting(model, check_early_exit(model), texts, rows, 4, None, 1, 3)
    assert (asked.exit_layer, asked.draft_tokens) == (1, 3)
