"""Lightning's DeepSpeedStrategy by ZeRO 1, 2 and 3, if DeepSpeed is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning.test_sharded import check_measured
from tests.support.skips import deepspeed
from tests.support.ways_to_resume import BATCHES, by_hand, fit_in_parts
from tests.support.ways_to_shard import whole_weights


@pytest.mark.thorough
@deepspeed
@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (2, 2), (3, 2)])
def test_two_processes_fit_as_one_and_resume(tmp_path: Path, stage: int, accumulate: int) -> None:
    how: dict[str, Any] = {"way": f"ZeRO {stage}", "accumulate": accumulate}
    # Lightning 2.6 and DeepSpeed both divide by the number of accumulated batches, term or not.
    whole = by_hand(2, accumulate, torch.float32, rate=0.1 / accumulate)
    found = fit_in_parts(tmp_path, 2, **how)
    torch.testing.assert_close(found, whole_weights(whole), atol=1e-5, rtol=0)
    check_measured(tmp_path, whole, BATCHES // accumulate, 1e-4)
    resumed = fit_in_parts(tmp_path, 2, tmp_path / "parts.ckpt", epochs=2, **how)
    straight = fit_in_parts(tmp_path, 2, epochs=2, **how)
    silent, without = (fit_in_parts(tmp_path, 2, None, each, **how) for each in (0.0, None))
    for one, other in ((resumed, straight), (silent, without)):
        assert all(torch.equal(one[name], other[name]) for name in other)
