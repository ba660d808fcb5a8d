"""Which exit is recommended, and exits that stop where they are sure."""

from __future__ import annotations

import pytest
import torch

import softtrace
from softtrace.decoding.recommend import GATES, gated_exits, guesses_of, recommended_exit
from softtrace.decoding.replay import Guesses, best_drafting
from softtrace.density.exits import exit_agreement
from tests.support.tiny import tiny_model, tiny_prompt


@torch.no_grad()
def test_gated_exits_stop_at_the_first_layer_that_is_sure() -> None:
    model, ids = tiny_model("llama", seed=2), tiny_prompt(10, batch=3)
    model.lm_head.weight.mul_(2)  # surer
    instrument = softtrace.attach(model)
    recording = instrument.record(instrument.batch(ids), keep_hidden=True)
    output = model(input_ids=ids, output_hidden_states=True)
    written = output.logits.argmax(-1)[:, 3:9]
    texts = [guesses_of(instrument, recording, slice(3, 9), written, row) for row in range(3)]
    exits = [model.lm_head(model.model.norm(h)) for h in output.hidden_states[1:-1]]
    stopped = set()
    for gate in GATES:
        layers, rights = [], []
        for row in range(3):
            for position in range(3, 9):
                layer, logits = 3, output.logits[row, position]
                for depth, early in enumerate(exits, start=1):
                    if early[row, position].softmax(-1).max() >= gate:
                        layer, logits = depth, early[row, position]
                        break
                layers.append(layer)
                rights.append(bool(logits.argmax() == output.logits[row, position].argmax()))
                stopped.add(layer)
        used, right = gated_exits(texts, gate)
        assert used == pytest.approx(sum(layers) / 18)
        assert right == pytest.approx(sum(rights) / 18)
    assert stopped == {1, 2, 3}


@pytest.mark.thorough
def test_the_recommended_exit_is_the_best_by_agreement_on_second_halves() -> None:
    for seed in range(4):
        model, blocks = tiny_model("llama", seed=seed, num_hidden_layers=5), tiny_prompt(8, batch=7)
        instrument = softtrace.attach(model)
        with torch.no_grad():
            agreed = exit_agreement(
                instrument, instrument.record(instrument.batch(blocks), keep_hidden=True)
            )
            hidden = model(input_ids=blocks, output_hidden_states=True).hidden_states
        sure = [model.lm_head(model.model.norm(h)).softmax(-1).amax(-1) for h in hidden[1:-1]]
        texts = [
            Guesses(agreed[:4, row, 4:].tolist(), [each[row, 4:].tolist() for each in sure])
            for row in range(7)
        ]
        costs = {layer: layer / 5 for layer in range(1, 5)}
        checks = {layer: [1 - layer / 5] * 12 for layer in costs}
        wanted = best_drafting(texts, costs, costs, checks)
        assert recommended_exit(model, blocks, batch_size=3) == wanted.exit_layer
