"""The term in a plain loop by DeepSpeed's ZeRO 1 and 2, if DeepSpeed is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.skips import deepspeed
from tests.support.ways_to_shard import OPTIONS, STEPS, of_ranks, trained


@pytest.mark.thorough
@deepspeed
@pytest.mark.parametrize("way", ["ZeRO 1", "ZeRO 2"])
def test_two_processes_train_as_one(tmp_path: Path, way: str) -> None:
    losses, weights = trained(None, OPTIONS["default"], STEPS, 0, 2, torch.float32)
    for rank, found in enumerate(of_ranks(tmp_path, 2, way)):
        own, after = found[f"{way}, default"]
        torch.testing.assert_close(own, losses[rank::2], atol=1e-5, rtol=0)
        torch.testing.assert_close(after, weights, atol=1e-5, rtol=0)
