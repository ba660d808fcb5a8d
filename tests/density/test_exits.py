"""Early exits against a literal pass through the layers."""

from __future__ import annotations

import pytest
import torch

import softtrace
from softtrace.decoding.recommend import guesses_of
from softtrace.density.exits import exit_agreement, exit_layers
from tests.support import oracle
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_reading_transformers_hidden_states(family: str) -> None:
    model, ids = tiny_model(family), tiny_prompt(10, batch=3)
    instrument = softtrace.attach(model)
    found = exit_agreement(instrument, instrument.record(instrument.batch(ids), keep_hidden=True))
    output = model(input_ids=ids, output_hidden_states=True)
    wanted = output.logits.argmax(-1)
    final_norm = oracle.final_norm(model)
    for layer, hidden in enumerate(output.hidden_states[1:-1]):  # the last one is normed already
        expected = model.lm_head(final_norm(hidden)).argmax(-1) == wanted
        assert torch.equal(found[layer], expected)
    assert found.shape == (3, 3, 10)
    assert found[-1].all()
    assert not found[0].all()


def test_needs_hidden_states() -> None:
    model = tiny_model("llama")
    instrument = softtrace.attach(model)
    with pytest.raises(ValueError, match="keep_hidden=True"):
        exit_agreement(instrument, instrument.record(instrument.batch(tiny_prompt(4))))
    with pytest.raises(ValueError, match="keep_hidden=True"):
        guesses_of(
            instrument,
            instrument.record(instrument.batch(tiny_prompt(4))),
            slice(None),
            tiny_prompt(4),
        )


def test_an_exit_counts_from_where_all_later_ones_agree() -> None:
    agreed = torch.tensor(
        [[True, True, False, False], [True, False, False, False], [True, True, True, False],
         [True, True, True, True]]
    )  # fmt: skip
    assert exit_layers(agreed).tolist() == [1, 3, 3, 4]
