"""A checkpoint in parts continues at another number of processes, to the weights of no break."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ways_to_continue import BATCHES, LEGS, continued
from tests.support.ways_to_shard import OPTIONS, trained


@pytest.mark.thorough
def test_two_processes_then_three_then_one_train_as_one_throughout(tmp_path: Path) -> None:
    options = OPTIONS["default"]
    for first, last, ranks in LEGS:
        after = continued(tmp_path, ranks, first, last)
        _, wanted, _ = trained(None, options, last, 0, BATCHES)
        torch.testing.assert_close(after, wanted, atol=1e-12, rtol=0)
    _, anew, _ = trained(None, options, 2, 0, BATCHES)
    assert max((anew[name] - wanted[name]).abs().max() for name in wanted) > 1e-4
