"""What a preset comes to in the options of a run."""

from __future__ import annotations

from typing import Any

from softtrace.cli.presets import fill_preset
from softtrace.loss.options import PRESETS, DensityOptions

NONE: dict[str, Any] = dict.fromkeys(PRESETS["balanced"])


def filled(preset: Any, **given: Any) -> tuple[dict[str, Any], str | None]:
    penalty = {**NONE, **given}
    said = fill_preset(penalty, DensityOptions(preset=preset, **given))
    return penalty, said


def test_the_numbers_of_a_preset_are_written_down() -> None:
    assert filled("decode") == (PRESETS["decode"], None)
    assert filled("decode", exits=0.3) == ({**PRESETS["decode"], "exits": 0.3}, None)


def test_a_preset_beside_the_numbers_of_another_is_said() -> None:
    first, _ = filled("balanced")
    assert filled("balanced", **{**first, "exit_depths": [0.5, 0.5]})[1] is None
    found, said = filled("decode", **first)
    assert found == first
    assert said is not None
    assert "'decode' sets nothing" in said
    assert "strength 0.35 for 0.1, exits 0.2 for 2.0, exit_quantile 0.35 for 1.0" in said
