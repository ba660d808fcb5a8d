"""Every dial refuses what is outside its range, naming what was found and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softtrace import DensityLoss, DensityOptions, InvalidInputError
from softtrace.loss.options import PRESETS

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strength": -1.0}, r"strength: found -1.0, allowed \[0, inf\)"),
    ({"strength": math.inf}, r"strength: found inf, allowed \[0, inf\)"),
    ({"strength": math.nan}, r"strength: found nan, allowed \[0, inf\)"),
    ({"strength": "1"}, r"strength: found '1', allowed \[0, inf\)"),
    (
        {"preset": "fast"},
        "preset: found 'fast', allowed are 'balanced', 'sparse', 'decode', 'soft'",
    ),
    (
        {"strength": "sparse"},
        "strength: found 'sparse', allowed are numbers from 0; name the preset, preset='sparse'",
    ),
    ({"start_step": -1}, "start_step: found -1, allowed are integers from 0"),
    ({"start_step": 2.0}, "start_step: found 2.0, allowed are integers from 0"),
    ({"warmup_steps": -5}, "warmup_steps: found -5, allowed are integers from 0"),
    ({"exits": -1.0}, r"exits: found -1.0, allowed \[0, inf\)"),
    ({"exit_tokens": 0.0}, r"exit_tokens: found 0.0, allowed \(0, 1\]"),
    ({"exit_quantile": 1.5}, r"exit_quantile: found 1.5, allowed \(0, 1\]"),
    ({"exit_every": 0}, "exit_every: found 0, allowed are integers from 1"),
    ({"exit_map": 1}, "exit_map: found 1, allowed are booleans"),
    ({"exit_depths": (-0.1, 1.0)}, r"exit_depths: found -0.1, allowed \[0, 1\]"),
    ({"exit_depths": (0.6, 0.5)}, r"exit_depths: found \(0.6, 0.5\), expected \(low, high\)"),
    ({"every": 0}, "every: found 0, allowed are integers from 1"),
    ({"masks": "hard"}, "masks: found 'hard', allowed are 'straight', 'soft'"),
    ({"temperature": 0.0}, r"temperature: found 0.0, allowed \(0, inf\)"),
    ({"temperature": -0.5}, r"temperature: found -0.5, allowed \(0, inf\)"),
    ({"temperature": math.inf}, r"temperature: found inf, allowed \(0, inf\)"),
    ({"family": "deep"}, "family: found 'deep', allowed are 'both', 'sparse', 'shallow'"),
    ({"thresholds": (0.5, 0.1)}, r"thresholds: found \(0.5, 0.1\), expected \(low, high\)"),
    ({"thresholds": (0.0, 0.1)}, r"thresholds: found 0.0, allowed \(0, 1\)"),
    ({"thresholds": (0.1, 1.0)}, r"thresholds: found 1.0, allowed \(0, 1\)"),
    ({"thresholds": (0.1,)}, r"thresholds: found \(0.1,\), expected \(low, high\)"),
    ({"thresholds": 0.1}, r"thresholds: found 0.1, expected \(low, high\)"),
    ({"depths": (0.0, 1.0)}, r"depths: found 0.0, allowed \(0, 1\]"),
    ({"depths": (0.5, 1.1)}, r"depths: found 1.1, allowed \(0, 1\]"),
    ({"depths": (0.9, 0.5)}, r"depths: found \(0.9, 0.5\), expected \(low, high\)"),
    ({"attention": "full"}, "attention: found 'full', allowed are 'recorded', 'recomputed'"),
    ({"distance": "js"}, "distance: found 'js', allowed are 'kl', 'tv'"),
    ({"easiness": "speed"}, "easiness: found 'speed', allowed are 'entropy', 'loss', 'margin'"),
    ({"easy_quantile": 0.0}, r"easy_quantile: found 0.0, allowed \(0, 1\]"),
    ({"easy_quantile": 1.2}, r"easy_quantile: found 1.2, allowed \(0, 1\]"),
    ({"easy_width": -0.1}, r"easy_width: found -0.1, allowed \[0, inf\)"),
    ({"share": 0.0}, r"share: found 0.0, allowed \(0, 1\]"),
    ({"share": 1.5}, r"share: found 1.5, allowed \(0, 1\]"),
    ({"crop": 0}, "crop: found 0, allowed are integers from 1, None"),
    ({"crop": 2.5}, "crop: found 2.5, allowed are integers from 1, None"),
    ({"crop": True}, "crop: found True, allowed are integers from 1, None"),
    ({"size_weight": -1.0}, r"size_weight: found -1.0, allowed \[0, inf\)"),
    ({"size_weight": 1.0, "family": "shallow"}, "size_weight: the family 'shallow' has no"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite: found 'ignore', allowed are 'raise', 'skip'"),
    ({"cuda_graph": 1}, "cuda_graph: found 1, allowed are booleans"),
    ({"fuse": 1}, "fuse: found 1, allowed are booleans and None"),
    ({"seed": 0.5}, "seed: found 0.5, allowed are integers"),
    ({"seed": True}, "seed: found True, allowed are integers"),
    ({"budget": 0.01}, "budget: found no reference, .* run once with strength 0"),
    ({"budget": 0.0, "reference": "plain"}, r"budget: found 0.0, allowed \(0, inf\)"),
    ({"reference": "plain"}, "reference: found one without a budget; set budget too"),
    ({"budget": 0.01, "reference": {}}, "reference: found {}, allowed are losses"),
    ({"monitor": 3}, "monitor: found 3, allowed are names, None"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_values_outside_their_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{message}"):
        DensityOptions(**changes)
    with pytest.raises(ValueError, match=message):  # what a caller would expect to catch
        dataclasses.replace(DensityOptions(), **changes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sparse", "density: found 'sparse', allowed are a mapping of options"),
        (0.5, "density: found 0.5, allowed are a mapping of options"),
        (
            {"strngth": 1.0},
            r"density: found 'strngth' \(did you mean 'strength'\?\), allowed are strength, ",
        ),
        ({"colour": 1.0}, "density: found 'colour', allowed are strength, preset, "),
    ],
)
def test_what_names_no_options_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{message}"):
        DensityOptions.of(wrong)
    options = DensityOptions(share=0.5)
    assert DensityOptions.of(options) is options
    assert DensityOptions.of({"share": 0.5}) == options
    assert DensityOptions.of(None) == DensityOptions()


@pytest.mark.parametrize("error", [InvalidInputError, TypeError])  # as of any wrong keyword
def test_a_misspelt_option_is_named_with_what_is_close(error: type[Exception]) -> None:
    message = r"^DensityLoss: found 'strenght' \(did you mean 'strength'\?\), allowed are "
    with pytest.raises(error, match=message):
        DensityLoss(nn.Linear(1, 1), strenght=1.0)
    with pytest.raises(error, match=message):
        DensityLoss(nn.Linear(1, 1), DensityOptions(), strenght=1.0)


def test_every_field_has_a_refusal() -> None:
    fields = {field.name for field in dataclasses.fields(DensityOptions)}
    assert {name for changes, _ in REFUSED for name in changes} == fields


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": 0}, {"strength": 3}, {"thresholds": (0.2, 0.2)}, {"depths": (1.0, 1.0)},
        {"depths": (1e-9, 1e-9)}, {"easy_quantile": 1.0}, {"easy_width": 0.0}, {"share": 1},
        {"crop": 1}, {"crop": None}, {"size_weight": 1.0, "family": "sparse"},
        {"thresholds": [0.1, 0.2]}, {"easiness": lambda logits, targets: logits[..., 0]},
        {"seed": -3}, {"temperature": 1e-9},
    ],
    ids=lambda changes: str(changes)[:22],  # not the address of a function
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(changes: dict[str, Any]) -> None:
    options = DensityOptions(**changes)
    for name, value in changes.items():
        assert getattr(options, name) == value


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_sets_what_is_not_given(preset: Any) -> None:
    options = DensityOptions(preset=preset)
    assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]
    given = DensityOptions(preset=preset, exits=0.7)
    assert given.exits == 0.7
    assert given.strength == PRESETS[preset]["strength"]
    assert DensityOptions(preset=preset, strength=0).strength == 0


def test_soft_is_balanced_with_soft_masks() -> None:
    soft, balanced = DensityOptions(preset="soft"), DensityOptions()
    assert (soft.masks, soft.temperature) == ("soft", 0.1)
    assert (balanced.masks, balanced.temperature) == ("straight", 0.5)
    other = {"preset": "balanced", "masks": "straight", "temperature": 0.5}
    assert dataclasses.replace(soft, **other) == balanced  # nothing else is another
    assert soft.through_importances
    assert not DensityOptions(preset="soft", masks="straight").through_importances


def test_without_a_preset_it_is_the_balanced_one() -> None:
    assert DensityOptions() == DensityOptions(preset="balanced")
    assert len({str(DensityOptions(preset=preset)) for preset in PRESETS}) == 4


@given(
    layers=st.integers(1, 80),
    low=st.floats(0.001, 1.0),
    high=st.floats(0.001, 1.0),
    family=st.sampled_from(["both", "sparse", "shallow"]),
)
def test_depth_bounds(layers: int, low: float, high: float, family: Any) -> None:
    low, high = min(low, high), max(low, high)
    first, last = DensityOptions(depths=(low, high), family=family).depth_bounds(layers)
    if family == "sparse":
        assert first == last == layers
    else:
        assert 1 <= first <= last <= layers
        assert abs(first - low * layers) <= 0.5 or first == 1
        assert abs(last - high * layers) <= 0.5 or last == 1


def test_who_needs_gradients_through_the_importances() -> None:
    needs = {
        ("straight", "both", 0.0): False,
        ("straight", "sparse", 0.1): True,
        ("soft", "both", 0.0): True,
        ("soft", "sparse", 0.0): True,
        ("soft", "shallow", 0.0): False,
        ("straight", "shallow", 0.0): False,
    }
    for (masks, family, weight), expected in needs.items():
        options: Any = {"masks": masks, "family": family, "size_weight": weight}
        assert DensityOptions(**options).through_importances is expected


def test_options_are_constants_with_a_schedule() -> None:
    options = DensityOptions(strength=2.0, start_step=1, warmup_steps=1, every=1)
    assert [options.schedule(step) for step in range(4)] == [0, 1, 2, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strength = 1.0  # type: ignore[misc]


def test_what_a_device_decides_is_decided_for_it_and_nothing_else() -> None:
    options = DensityOptions(strength=2.0)
    cpu, cuda, mps = (options.on(torch.device(name)) for name in ("cpu", "cuda:1", "mps"))
    found = [(each.every, each.share) for each in (cpu, cuda, mps)]
    assert found == [(1, 0.125), (2, 0.15), (8, 0.3)]
    launched = dataclasses.replace(options, cuda_graph=False)
    assert launched.on(torch.device("cuda")) == dataclasses.replace(mps, cuda_graph=False)
    assert dataclasses.replace(cuda, every=None, share=None) == options
    assert cuda.window_share == cuda.share
    assert [mps.schedule(step) for step in (0, 1, 7, 8)] == [16, 0, 0, 16]
    with pytest.raises(ValueError, match="every is None"):
        _ = options.schedule
    with pytest.raises(ValueError, match="share is None"):
        _ = options.window_share
    chosen = DensityOptions(every=3, share=0.5)
    assert chosen.on(torch.device("cuda")) == chosen.on(torch.device("cpu")) == chosen


def test_who_asks_for_no_exits_gets_no_map() -> None:
    assert DensityOptions().exit_map
    assert DensityOptions().reads_exits
    assert not DensityOptions(exits=0.0).reads_exits
    assert DensityOptions(exits=0.0, exit_map=True).reads_exits
    assert not DensityOptions(strength=0.0).reads_exits
