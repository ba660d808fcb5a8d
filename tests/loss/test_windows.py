"""What the term sees of a batch: windows, each a sequence of its own, wherever padding is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace import DensityLoss
from softtrace.graph.batch import Batch
from softtrace.tracing.instrument import Instrument
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What every recording run was given."""
    seen: list[Batch] = []
    record = Instrument.record

    def spy(self: Instrument, batch: Batch, **options: Any) -> Any:
        seen.append(batch)
        return record(self, batch, **options)

    monkeypatch.setattr(Instrument, "record", spy)
    return seen


def test_windows_of_padding_alone_are_never_looked_at(windows: list[Batch]) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(12, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :8], mask[1, 4:] = 0, 0  # left and right
    penalty = DensityLoss(model, share=1.0, crop=4)
    windows.clear()  # attaching records too
    for step in range(4):
        term = penalty(ids, mask, step=step)
        assert term.skipped is None
    for seen in windows:
        assert seen.input_ids.shape == (1 + 1 + 3, 4)  # none of the four that are padding alone
        assert seen.valid.any(-1).all()


def test_the_term_of_a_window_is_that_of_the_window_alone() -> None:
    """No token outside has a say: the windows of a batch given as rows of their own."""
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(12, batch=2)
    whole = DensityLoss(model, share=1.0, crop=4)(ids, step=3)
    alone = DensityLoss(model, share=1.0, crop=None)(ids.reshape(6, 4), step=3)
    torch.testing.assert_close(whole.loss, alone.loss)
    other = ids.clone()
    other[:, 5] = 66 - other[:, 5] + 3
    assert DensityLoss(model, share=1.0, crop=4)(other, step=3).loss != whole.loss


@pytest.mark.thorough
def test_more_share_is_less_noise_around_the_same_mean() -> None:
    """Every window has the same chance, so that the share moves the spread of the term alone."""
    model, ids = tiny_model("llama"), tiny_prompt(16, batch=4)
    found = {}
    for share in (1 / 8, 1.0):
        penalty = DensityLoss(
            model, strength=1.0, share=share, crop=4, easy_quantile=1.0, thresholds=(0.2, 0.2),
            depths=(1.0, 1.0),
        )  # fmt: skip
        terms = [penalty(ids, step=step).loss.item() for step in range(60)]
        found[share] = torch.tensor(terms)
    assert found[1.0].std() < 1e-6  # every window, one threshold, one depth
    error = found[1 / 8].std() / 60**0.5
    assert error > 0
    assert (found[1 / 8].mean() - found[1.0].mean()).abs() < 4 * error
