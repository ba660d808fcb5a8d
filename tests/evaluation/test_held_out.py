"""What ``softtrace fit`` measures of a model at its end."""

from __future__ import annotations

import pytest

from softtrace.errors import DataError
from softtrace.evaluation.held_out import measured
from softtrace.report.tables import MEASURES
from tests.support.tiny import tiny_model, tiny_prompt


def test_measured_numbers_lie_inside_their_intervals() -> None:
    found = measured(tiny_model("llama"), tiny_prompt(16, batch=9), "held out")
    assert found["tokens"] == 9 * 7
    assert set(found["intervals"]) == {m.key for m in MEASURES if m.unit != "correlation"}
    for measure in MEASURES:
        if measure.key in found["intervals"]:
            low, high = found["intervals"][measure.key]
            value = measure.read(found)
            assert value is not None
            assert low <= value <= high, measure.key
            assert low < high, measure.key
    assert found == measured(tiny_model("llama"), tiny_prompt(16, batch=9), "held out")
    alone = measured(tiny_model("llama"), tiny_prompt(16, batch=1), "held out")
    assert alone["intervals"] == {}
    with pytest.raises(DataError, match="blocks: found 3 tokens in each, allowed are 4 or more"):
        measured(tiny_model("llama"), tiny_prompt(3, batch=9), "held out")
