"""A confidence that is chosen for an agreement."""

from __future__ import annotations

import pytest
import torch

from softtrace.decoding import calibrated_confidence
from softtrace.decoding.calibration import LEAST, least_confidence
from softtrace.errors import InvalidInputError
from tests.support.tiny import tiny_model, tiny_prompt

#: 100 tokens: the surest 40 are right, of the next 40 every second is, of the last 20 none
SURE = [1 - place / 200 for place in range(100)]
RIGHT = [place < 40 or (place < 80 and place % 2 == 0) for place in range(100)]


def test_the_least_confidence_with_the_agreement_is_found() -> None:
    everything = least_confidence(SURE, RIGHT, 1.0)
    assert everything.confidence == SURE[40]  # the 41st happens to be right
    assert (everything.agreement, everything.share) == (1.0, 0.41)
    most = least_confidence(SURE, RIGHT, 0.75)
    assert most.agreement >= 0.75
    assert most.share == pytest.approx(0.8, abs=0.01)
    # Of each: what is added by the next tokens is right every second time only.
    each = least_confidence(SURE, RIGHT, 0.75, each=True)
    assert each.share == pytest.approx(0.4, abs=0.02)
    assert least_confidence(SURE, RIGHT, 0.4, each=True).share == pytest.approx(0.8, abs=0.02)
    assert least_confidence(SURE, RIGHT, 0.0).share == 1


def test_equals_are_taken_together_and_few_are_not_enough() -> None:
    sure = [0.9] * 60 + [0.5] * 40
    right = [True] * 45 + [False] * 15 + [True] * 40
    assert least_confidence(sure, right, 0.7).share == 1
    assert least_confidence(sure[:60], right[:60], 0.75).agreement == 0.75
    with pytest.raises(InvalidInputError, match=r"most: 0\.750"):
        least_confidence(sure[:60], right[:60], 0.9)
    with pytest.raises(InvalidInputError, match="at least 30 of 29 tokens"):
        least_confidence(SURE[:29], RIGHT[:29], 0.5)
    with pytest.raises(InvalidInputError, match=r"agreement: found 1\.5"):
        least_confidence(SURE, RIGHT, 1.5)


def test_it_is_counted_on_what_exit_and_model_say() -> None:
    model, ids = tiny_model("llama", seed=2), torch.cat([tiny_prompt(40, seed=s) for s in (1, 2)])
    with torch.no_grad():
        whole = model(ids).logits.argmax(-1)
    found = calibrated_confidence(model, ids, exit_layer=2, agreement=0.0)
    assert found.share == 1
    with torch.no_grad():
        model.config.num_hidden_layers = 2
        early = model(ids).logits.argmax(-1)
        model.config.num_hidden_layers = 3
    assert found.agreement == pytest.approx(float((whole == early).double().mean()))


def test_ids_that_are_none_are_named() -> None:
    model, ids = tiny_model("llama", seed=2), tiny_prompt(40)
    for wrong, said in ((ids[0], r"\[B, T\]"), (ids + 1000, "allowed are 0 to 66")):
        with pytest.raises(InvalidInputError, match=said):
            calibrated_confidence(model, wrong, exit_layer=2, agreement=0.1)


def test_as_many_tokens_as_are_asked_for_are_enough() -> None:
    assert least_confidence([0.9] * LEAST, [True] * LEAST, 1.0).share == 1
    with pytest.raises(InvalidInputError, match="on at least 30 of 29 tokens"):
        least_confidence([0.9] * (LEAST - 1), [True] * (LEAST - 1), 1.0)
