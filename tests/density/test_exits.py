"""Early exits against a literal pass through the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.anatomy.readout import Readout
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_few_tokens_decide_as_the_whole_vocabulary_does(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model, ids = tiny_model(family, dtype=dtype), tiny_prompt(12, batch=4)
    instrument = softtrace.attach(model)
    readout = type(instrument.anatomy.readout)
    early, read = readout.early, [0]

    def counted(self: Readout, hidden: Tensor) -> Tensor:
        read[-1] += len(hidden)
        return early(self, hidden)

    monkeypatch.setattr(readout, "early", counted)
    recording = instrument.record(instrument.batch(ids), keep_hidden=True)
    found = exit_agreement(instrument, recording)
    read.append(0)
    monkeypatch.setattr(readout, "early_of", lambda *_: None)
    assert torch.equal(found, exit_agreement(instrument, recording))
    few, whole = read
    assert whole == 2 * ids.numel()  # two exits
    assert found[:-1].sum() <= few < 0.6 * whole


@torch.no_grad()
def test_a_head_that_somebody_changes_is_asked_itself() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(12, batch=3)
    instrument = softtrace.attach(model)
    turned = model.lm_head.register_forward_hook(lambda module, args, output: -output)
    recording = instrument.record(instrument.batch(ids), keep_hidden=True)
    found = exit_agreement(instrument, recording)
    turned.remove()
    assert recording.hidden is not None
    exits = torch.stack(recording.hidden[1:-1])
    least = model.lm_head(model.model.norm(exits)).argmin(-1)
    assert torch.equal(found[:-1], least == recording.logits.argmax(-1))
    assert found[:-1].any()


@torch.no_grad()
def test_of_one_layer_there_is_no_exit() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    instrument = softtrace.attach(model)
    recording = instrument.record(instrument.batch(tiny_prompt(5)), keep_hidden=True)
    assert exit_agreement(instrument, recording).tolist() == [[[True] * 5]]


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
