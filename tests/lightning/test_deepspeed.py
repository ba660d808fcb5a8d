"""Lightning's DeepSpeedStrategy by ZeRO 1, 2 and 3, if DeepSpeed is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.lightning.test_sharded import check_measured
from tests.support.cut_fits import cut_and_resumed, of_zero
from tests.support.jobs import Jobs, saved
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


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_fit_by_zero_that_was_cut_resumes_to_the_same_weights(tmp_path: Path, stage: int) -> None:
    jobs, parts = Jobs(tmp_path), (*of_zero(stage), "--trainer.devices", 2)
    straight = jobs.run(tmp_path / "straight", "none", 0, 0, *parts)
    assert straight.code == 0, straight.said
    cut_and_resumed(jobs, tmp_path / "cut", parts)
    whole, resumed = saved(tmp_path / "straight"), saved(tmp_path / "cut")
    before = saved(jobs.model)
    assert {name: each.shape for name, each in whole.items()} == {
        name: each.shape for name, each in before.items()
    }
    assert not torch.equal(whole["transformer.wte.weight"], before["transformer.wte.weight"])
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert resumed.keys() == whole.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoints"
    assert [each.name for each in folder.iterdir()] == ["last.ckpt"]
    alone = jobs.run(
        tmp_path / "cut", "none", 0, 0, *of_zero(stage), "--trainer.devices", 1, "--resume", "true"
    )
    assert alone.code != 0
    assert "written by 2 processes, and this run has 1" in alone.said


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize("more", [("--model.lora.rank", 2), ("--penalty.strength", 0)])
def test_a_fit_by_zero_3_is_that_by_ddp(tmp_path: Path, more: tuple[object, ...]) -> None:
    jobs = Jobs(tmp_path)
    for name, way in (("zero", of_zero(3)), ("ddp", ("--trainer.strategy", "ddp"))):
        done = jobs.run(tmp_path / name, "none", 0, 0, *way, "--trainer.devices", 2, *more)
        assert done.code == 0, done.said
    found, wanted, before = map(saved, (tmp_path / "zero", tmp_path / "ddp", jobs.model))
    assert found.keys() == wanted.keys()
    # AdamW divides rounding by small gradients; what training changed is some hundred times that.
    moved = sum(float((wanted[name] - before[name]).abs().sum()) for name in wanted)
    apart = sum(float((found[name] - wanted[name]).abs().sum()) for name in wanted)
    assert apart < 1e-2 * moved
