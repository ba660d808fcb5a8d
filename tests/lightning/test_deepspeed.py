"""Lightning's DeepSpeedStrategy by ZeRO 1 and 2, if DeepSpeed is there; weights stay whole."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softtrace.errors import TrainerSetupError
from softtrace.lightning import DensityMonitor, DensityPenalty
from tests.support import warm
from tests.support.processes import script_environment
from tests.support.ways_to_resume import by_hand
from tests.support.ways_to_shard import whole_weights


def fitted(folder: Path, stage: int, accumulate: int, strength: float | None) -> list[Any]:
    words = ["lightning-deepspeed", folder, stage, accumulate, strength]
    done = warm.run(
        [sys.executable, "-m", "tests.support.ways_to_resume", *words],
        env=script_environment(), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"zero-{stage}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not there")
@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (2, 2)])
def test_two_processes_fit_as_one(tmp_path: Path, stage: int, accumulate: int) -> None:
    # Lightning 2.6 and DeepSpeed both divide by the number of accumulated batches, term or not.
    wanted = whole_weights(by_hand(2, accumulate, torch.float32, rate=0.1 / accumulate))
    for found in fitted(tmp_path, stage, accumulate, 0.5):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    silent, without = (fitted(tmp_path, stage, accumulate, each)[0] for each in (0.0, None))
    assert all(torch.equal(silent[name], without[name]) for name in without)


def test_stage_3_is_refused_before_anything_is_sharded() -> None:
    class DeepSpeedStrategy:
        zero_stage_3 = True

    trainer: Any = SimpleNamespace(strategy=DeepSpeedStrategy(), callbacks=[], global_step=0)
    for callback in (DensityPenalty(), DensityMonitor()):
        trainer.callbacks = [callback]
        with pytest.raises(TrainerSetupError, match=r"found DeepSpeedStrategy\(stage=3\)"):
            callback.setup(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]
