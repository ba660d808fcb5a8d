"""``softtrace fit`` on two GPUs, whose processes meet by NCCL: failures, and what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.cut_fits import WHOLE
from tests.support.jobs import Jobs, saved
from tests.support.skips import two_gpus

ENGINES: dict[str, tuple[object, ...]] = {
    "DDP": ("--trainer.strategy", "ddp"),
    "FSDP2": WHOLE,
    "FSDP1": (
        *("--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"),
        *("--trainer.strategy.state_dict_type", "full"),
    ),
}


@two_gpus
@pytest.mark.parametrize(
    ("engine", "fault", "rank", "said"),
    [
        ("DDP", "raise", 1, "planned failure of rank 1"),
        ("DDP", "kill", 1, ""),
        ("FSDP2", "raise", 0, "planned failure of rank 0"),
        ("FSDP2", "interrupt", 1, ""),
        ("FSDP1", "raise", 1, "planned failure of rank 1"),
    ],
)
def test_a_process_that_fails_ends_both_and_the_fit_resumes_to_a_whole_model(
    tmp_path: Path, engine: str, fault: str, rank: int, said: str
) -> None:
    jobs, out = Jobs(tmp_path), tmp_path / "out"
    options = ("--trainer.accelerator", "gpu", "--trainer.devices", 2, *ENGINES[engine])
    cut = jobs.run(out, fault, 3, rank, *options)  # which fails the test where it hangs
    assert cut.code != 0
    assert said in cut.said
    end = jobs.run(out, "none", 0, 0, *options, "--resume", "true")
    assert end.code == 0, end.said[-3000:]
    assert "holds no checkpoint yet" not in end.said
    before, after = saved(jobs.model), saved(out)
    assert {n: each.shape for n, each in after.items()} == {
        n: each.shape for n, each in before.items()
    }
    assert all(each.isfinite().all() for each in after.values())
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    AutoModelForCausalLM.from_pretrained(out)
