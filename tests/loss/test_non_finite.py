"""Steps that are not finite: the error, or the step without the term; also of the last step."""

from __future__ import annotations

from unittest.mock import MagicMock, patch

import pytest
import torch

from softtrace import DensityLoss
from softtrace.errors import NonFiniteError
from softtrace.loss.non_finite import NonFiniteSteps
from tests.support.tiny import tiny_model


def test_the_error_names_the_step_or_the_step_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    found = NonFiniteError("logits are NaN")
    with pytest.raises(NonFiniteError, match=r"^step 3: logits are NaN$") as raised:
        NonFiniteSteps("raise").met(f"step 3: {found}", found)
    assert raised.value.__cause__ is found
    assert not caplog.messages
    skips = NonFiniteSteps("skip")
    for step in range(5):
        skips.met(f"step {step}: {found}", found)
    assert [text.split()[1] for text in caplog.messages] == ["0:", "1:", "3:"]
    assert caplog.messages[-1].endswith("so far 4 times.")


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_the_last_step_is_told_of_and_ends_nothing(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    density = DensityLoss(tiny_model("llama"), on_nonfinite=mode)
    density.finish()
    assert not caplog.messages
    with (
        patch("torch.cuda.Event", MagicMock()),
        patch("torch.cuda.current_stream", lambda device: None),
    ):
        density._later.begin(9)
        density._later.ask(torch.tensor(False), "logits")
        density.finish()
        density.finish()
    (said,) = caplog.messages
    assert said.startswith("step 9: logits are NaN or infinite")
    assert said.endswith("It was the last step; its density term was left out.")
