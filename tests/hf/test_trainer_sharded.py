"""transformers' Trainer with FSDP1 and FSDP2, as Accelerate shards a model; its checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.hf_training import OPTIONS, by_hand
from tests.support.processes import script_environment
from tests.support.warm import run_ranks
from tests.support.ways_to_resume import HF_CLIP
from tests.support.ways_to_shard import whole_weights

pytestmark = pytest.mark.thorough


def trained(
    folder: Path, version: int, world: int, checkpoint: Path | None = None
) -> dict[str, Tensor]:
    """Weights after a training, or as one loads them from a checkpoint."""
    words = ["-m", "tests.support.ways_to_resume", "trainer", folder, checkpoint, version]
    for done in run_ranks([sys.executable, *words], world, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Tensor] = torch.load(folder / f"trainer-{world}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_two_processes_equal_the_loop_by_hand_and_three_resume(
    tmp_path: Path, version: int
) -> None:
    after = trained(tmp_path, version, 2)
    wanted = whole_weights(by_hand(1, True, OPTIONS, 2, clip=HF_CLIP[version]))
    torch.testing.assert_close(after, wanted, atol=1e-10, rtol=0)
    if version == 1:  # whose checkpoints are tried in Lightning
        return
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    loaded = trained(tmp_path, version, 3, last)
    assert all(torch.equal(loaded[name], after[name]) for name in after)
