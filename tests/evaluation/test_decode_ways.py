"""The race of ways to decode: each way to make guesses alone, and all write the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softtrace.decoding import Generation, check_cache, check_early_exit
from softtrace.decoding.replay import Drafting
from softtrace.evaluation.decode_race import write_past_ends
from softtrace.evaluation.decode_ways import largest_tie, race_ways
from softtrace.model.exit_maps import ExitMaps, set_exit_maps
from tests.support.tiny import tiny_model, tiny_prompt

NEW = 12


@pytest.mark.thorough
def test_each_way_to_guess_is_measured_alone() -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    with torch.no_grad():  # what the exit says is what the model says
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    write_past_ends(model)
    proven = check_cache(check_early_exit(model))
    maps = ExitMaps([2], model.config.hidden_size).double()  # and its map makes it wrong
    with torch.no_grad():
        for parameter in maps.parameters():
            nn.init.normal_(parameter, std=9.0)
    set_exit_maps(model, maps)
    way = Drafting(2, 3, 0.05, 1.0, 0, 0, 0)
    rows = [tiny_prompt(8, seed=seed) for seed in range(2)]
    race = race_ways(model, proven, rows, way, NEW, 1, None)["race"]
    accepted = {
        name.removesuffix(", fixed shapes"): each["acceptance"]
        for name, each in race["ways"].items()
        if name.endswith("drafts, fixed shapes") or "drafts " in name
    }
    assert {*accepted} == {
        "exit drafts", "exit drafts without the map", "exit drafts to the first unsure",
        "lookup drafts", "lookup or exit drafts",
    }  # fmt: skip
    assert accepted["exit drafts without the map"] == 1
    assert accepted["exit drafts"] < 0.5
    assert all(each["identical"] == 1 for each in race["ways"].values())
    assert race["ways"]["plain, fixed shapes"]["acceptance"] is None


def test_what_is_not_compiled_is_left_out() -> None:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    write_past_ends(model)
    way, rows = Drafting(2, 3, 0.0, 1.0, 0, 0, 0), [tiny_prompt(8)]
    proven = check_cache(check_early_exit(model))
    race = race_ways(model, proven, rows, way, 2, 1, "no such")["race"]
    assert "not compiled by 'no such'" in race["left_out"]
    assert not any("compiled" in name for name in race["ways"])
    assert race["use"] in race["ways"]


def test_a_tie_is_named() -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(8)
    with torch.no_grad():
        scores = model(row).logits[0, -1]
        order = scores.argsort(descending=True)
        second = (scores[order[0]] - scores[order[1]]) / scores.abs().max()

    def text(token: Tensor) -> Generation:
        return Generation(torch.stack([token, order[5]]), 0, 0, 0)

    rows = [tiny_prompt(8, seed=1), row]
    same, other = [text(order[0])] * 4, [text(order[0]), text(order[1])] * 2
    assert largest_tie(model, rows, same, same) is None
    assert largest_tie(model, rows, same, other) == pytest.approx(float(second), rel=1e-4)
    with torch.no_grad():
        model.lm_head.weight[order[1]] = model.lm_head.weight[order[0]]
    assert largest_tie(model, rows, same, other) == 0
