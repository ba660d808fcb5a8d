"""Maps of exits: nothing at first, beside the weights on a disk, never a part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import softtrace
from softtrace import ModelDirectoryError
from softtrace.density.exits import exit_agreement
from softtrace.model.exit_maps import EXIT_MAPS_FILE, ExitMaps, exit_maps_of, set_exit_maps
from softtrace.model.loading import load_model
from tests.support.skips import cuda
from tests.support.tiny import tiny_model, tiny_prompt


def with_maps(depth: int = 1) -> tuple[torch.nn.Module, ExitMaps]:
    """A model whose exit after ``depth`` layers is read through a random map."""
    model = tiny_model("llama", num_hidden_layers=3)
    maps = ExitMaps((depth,), model.config.hidden_size)
    torch.nn.init.normal_(maps.weights[f"after_layer_{depth}"])
    set_exit_maps(model, maps)
    return model, maps


def test_a_new_map_changes_nothing_and_other_exits_have_none() -> None:
    maps, hidden = ExitMaps((1, 2), 4), torch.randn(3, 4)
    assert torch.equal(maps(hidden, 1), hidden)
    assert maps.weight(3) is None
    torch.nn.init.normal_(maps.weights["after_layer_1"])
    assert torch.equal(maps(hidden, 2), hidden)
    expected = hidden + hidden @ maps.weights["after_layer_1"].T
    torch.testing.assert_close(maps(hidden, 1), expected)
    assert torch.equal(maps(hidden, 3), hidden)
    assert maps(hidden.bfloat16(), 1).dtype == torch.bfloat16


def test_exits_are_read_through_the_map_and_the_model_is_as_it_was() -> None:
    model, maps = with_maps(depth=2)
    instrument, ids = softtrace.attach(model), tiny_prompt(9, batch=2)
    recording = instrument.record(instrument.batch(ids), keep_hidden=True)
    output = model(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(recording.logits, output.logits)
    first, second = output.hidden_states[1:3]
    second = second + second @ maps.weights["after_layer_2"].T
    logits = [model.lm_head(model.model.norm(hidden)) for hidden in (first, second)]
    found = exit_agreement(instrument, recording)[:2]
    wanted = torch.stack(logits).argmax(-1) == output.logits.argmax(-1)
    assert torch.equal(found, wanted)
    assert not any("after_layer" in name for name in model.state_dict())


def test_maps_lie_beside_the_weights(tmp_path: Path) -> None:
    model, maps = with_maps()
    model.save_pretrained(tmp_path)
    assert softtrace.save_exit_maps(model, tmp_path)
    assert softtrace.save_exit_maps(model, tmp_path / "not" / "there")  # weights may come later
    loaded = exit_maps_of(load_model(tmp_path))
    assert loaded is not None
    assert torch.equal(loaded.weights["after_layer_1"], maps.weights["after_layer_1"])
    set_exit_maps(model, None)
    assert exit_maps_of(model) is None
    assert not softtrace.save_exit_maps(model, tmp_path / "other")
    assert exit_maps_of(load_model(tmp_path)) is not None
    assert not softtrace.save_exit_maps(model, tmp_path)  # the old ones are of other weights
    assert exit_maps_of(load_model(tmp_path)) is None


def test_maps_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model, _ = with_maps()
    other = tiny_model("llama", hidden_size=48)
    softtrace.save_exit_maps(model, tmp_path)
    with pytest.raises(ModelDirectoryError, match="found exit maps of width 32 beside a model of"):
        softtrace.load_exit_maps(other, tmp_path)
    (tmp_path / EXIT_MAPS_FILE).write_bytes(b"no tensors")
    with pytest.raises(ModelDirectoryError, match=r"exit_maps\.safetensors: cannot be read"):
        softtrace.load_exit_maps(model, tmp_path)


def test_maps_are_kept_where_a_model_has_no_values() -> None:
    model, maps = with_maps()
    assert exit_maps_of(model.to("meta")) is maps
    assert maps.weights["after_layer_1"].device.type == "cpu"


def test_maps_that_move_in_inference_mode_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ``speculate``. Of another dtype weights are made anew, as on another device."""
    model, maps = with_maps()
    monkeypatch.setattr(maps, "to", lambda device: maps.double())
    with torch.inference_mode():
        exit_maps_of(model)
    assert maps.weights["after_layer_1"].dtype == torch.float64
    assert not maps.weights["after_layer_1"].is_inference()


@cuda
def test_maps_are_where_the_model_is() -> None:
    model, maps = with_maps()
    assert exit_maps_of(model.cuda()) is maps
    assert maps.weights["after_layer_1"].is_cuda
