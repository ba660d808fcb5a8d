"""transformers' Trainer by DeepSpeed's ZeRO 1, 2 and 3, if it is there.

It compiles a small extension once, for which it needs a C++ compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.hf_training import OPTIONS, by_hand
from tests.support.processes import script_environment
from tests.support.skips import deepspeed
from tests.support.warm import run_ranks
from tests.support.ways_to_resume import EPSILON
from tests.support.ways_to_shard import whole_weights


@pytest.mark.thorough
@deepspeed
@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_two_processes_equal_the_loop_by_hand(tmp_path: Path, stage: int, accumulate: int) -> None:
    words = ["-m", "tests.support.ways_to_resume", "deepspeed", tmp_path, stage, accumulate]
    for done in run_ranks([sys.executable, *words], 2, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    by = by_hand(accumulate, True, OPTIONS, 2, dtype=torch.float32, epsilon=EPSILON)
    wanted = whole_weights(by)
    for rank in range(2):
        found = torch.load(tmp_path / f"zero-{stage}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
