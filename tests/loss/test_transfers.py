"""What is copied early and what is asked later, where there is no CUDA, and where there is."""

from __future__ import annotations

from unittest.mock import MagicMock, patch

import pytest
import torch

from softtrace.errors import NonFiniteError
from softtrace.loss.transfers import EarlyCopies, LaterChecks, sent
from tests.support.cuda_waits import refusing_to_wait
from tests.support.skips import cuda


def test_on_a_cpu_nothing_is_copied() -> None:
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3)
    found = EarlyCopies({"input_ids": ids, "attention_mask": mask, "text": "a"}).of(
        ids, mask, None, None
    )
    assert found[0] is ids
    assert found[1] is mask
    assert found[2:] == (None, None)
    assert sent(ids, ids.device) is ids


@cuda
def test_a_copy_is_of_the_very_tensor_as_it_was() -> None:
    ids = torch.arange(6, device="cuda").view(2, 3)
    copies = EarlyCopies({"input_ids": ids, "weights": ids / 2})
    torch.cuda.synchronize()
    with refusing_to_wait():
        early = copies.of(ids, None, None, None)[0]
        with pytest.raises(RuntimeError, match="synchroniz"):
            copies.of(ids.clone(), None, None, None)
    assert early.tolist() == [[0, 1, 2], [3, 4, 5]]
    ids.add_(1)  # written since
    assert copies.of(ids, None, None, None)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert sent(early, ids.device).is_cuda


def test_what_was_not_finite_is_said_once_at_the_next_step() -> None:
    checks = LaterChecks()
    with (
        patch("torch.cuda.Event", MagicMock()) as event,
        patch("torch.cuda.current_stream", lambda device: f"stream of {device}"),
    ):
        checks.begin(6)
        checks.ask(torch.tensor(True), "logits")
        checks.begin(7)
        checks.ask(torch.tensor(True), "logits")
        checks.ask(torch.tensor(False), "distances")
        with pytest.raises(NonFiniteError, match="step 7: distances are NaN or infinite"):
            checks.begin(8)
        checks.begin(8)
    assert event.return_value.synchronize.call_count == 3  # each flag is there before it is read
    # Of the flag's own device, which need not be the current one.
    assert {each.args for each in event.return_value.record.call_args_list} == {("stream of cpu",)}
