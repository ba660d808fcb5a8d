"""A training in which no token has a target says so, once; a batch without any is normal."""

from __future__ import annotations

import logging

import pytest
import torch

from softtrace import DensityLoss
from softtrace.loss.inputs import MANY_BATCHES as MANY
from tests.support.tiny import tiny_model, tiny_prompt

IDS = tiny_prompt(8)
NONE = torch.full_like(IDS, -100)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


def test_many_batches_in_a_row_without_a_target_are_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    density = DensityLoss(tiny_model("llama"), exits=0)
    for _ in range(MANY - 1):
        assert float(density(IDS, labels=NONE).loss) == 0
    assert not warned(caplog)
    for _ in range(2 * MANY):
        density(IDS, labels=NONE)
    (said,) = warned(caplog)
    assert said.startswith(f"labels: in {MANY} batches in a row")


def test_batches_with_targets_between_them_are_normal(caplog: pytest.LogCaptureFixture) -> None:
    density = DensityLoss(tiny_model("llama"), exits=0)
    for number in range(2 * MANY):
        density(IDS, labels=IDS if number % (MANY - 1) == 0 else NONE)
    assert not warned(caplog)
