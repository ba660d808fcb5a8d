"""What a preset comes to in the options of a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from softtrace.cli.presets import fill_preset
from softtrace.loss.options import PRESETS, DensityOptions

NONE: dict[str, Any] = dict.fromkeys(PRESETS["balanced"])


def filled(preset: Any, **given: Any) -> dict[str, Any]:
    penalty = {**NONE, **given}
    fill_preset(penalty, DensityOptions(preset=preset, **given))
    return penalty


def test_the_numbers_of_a_preset_are_written_down(caplog: pytest.LogCaptureFixture) -> None:
    assert filled("decode") == PRESETS["decode"]
    assert filled("decode", exits=0.3) == {**PRESETS["decode"], "exits": 0.3}
    assert not caplog.records


def test_a_preset_beside_the_numbers_of_another_is_said(caplog: pytest.LogCaptureFixture) -> None:
    first = filled("balanced")
    assert filled("balanced", **{**first, "exit_depths": [0.5, 0.5]})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert filled("decode", **first) == first
    assert "'decode' sets nothing" in caplog.text
    assert "strength 0.35 for 0.1, exits 0.2 for 2.0, exit_quantile 0.35 for 1.0" in caplog.text
