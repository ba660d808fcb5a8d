"""transformers' Trainer by DeepSpeed's ZeRO 1 and 2, if it is there; weights stay whole.

It compiles a small extension once, for which it needs a C++ compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softtrace.errors import TrainerSetupError
from softtrace.hf.trainer import check_sharding
from tests.support.hf_training import OPTIONS, by_hand
from tests.support.processes import script_environment
from tests.support.skips import deepspeed
from tests.support.warm import run_ranks
from tests.support.ways_to_shard import whole_weights


@pytest.mark.thorough
@deepspeed
@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (2, 2)])
def test_two_processes_equal_the_loop_by_hand(tmp_path: Path, stage: int, accumulate: int) -> None:
    words = ["-m", "tests.support.ways_to_resume", "deepspeed", tmp_path, stage, accumulate]
    for done in run_ranks([sys.executable, *words], 2, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    # It computes in float32, which AdamW's first steps make more of.
    wanted = whole_weights(by_hand(accumulate, True, OPTIONS, 2, dtype=torch.float32))
    for rank in range(2):
        found = torch.load(tmp_path / f"zero-{stage}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("stage", "refused"), [(1, False), (2, False), (3, True)])
def test_stage_3_is_refused_by_name(stage: int, refused: bool) -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    trainer: Any = SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=state)
    )
    if not refused:
        check_sharding(trainer)
        return
    with pytest.raises(TrainerSetupError, match=r"found DeepSpeed ZeRO 3 .*supported are .*ZeRO 1"):
        check_sharding(trainer)
