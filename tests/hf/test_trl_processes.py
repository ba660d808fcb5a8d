"""TRL's SFTTrainer on two processes: the same weights on both, untouched at strength 0."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import script_environment
from tests.support.trl_training import OPTIONS
from tests.support.warm import run_ranks

RANKS = 2
SCRIPT = f"""
import sys
from pathlib import Path
import torch
from trl import SFTConfig, SFTTrainer
from tests.support.trl_training import Case, completions, fit

torch.set_num_threads(1)
folder = Path(sys.argv[1])
case = Case(SFTTrainer, SFTConfig, completions)
found = {{}}
for name, strength in (("plain", None), ("silent", 0.0), ("run", 0.6)):
    density = None if strength is None else {{**{OPTIONS!r}, "strength": strength}}
    run = fit(case, folder, density, max_steps=2)
    found[name] = {{"weights": run.weights, "logged": run.logged}}
rank = run.trainer.args.process_index
torch.save(found, folder / f"{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    for done in run_ranks([sys.executable, script, tmp_path], RANKS, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name in first:
        assert torch.equal(first[name]["weights"], second[name]["weights"]), name
    assert torch.equal(first["silent"]["weights"], first["plain"]["weights"])
    assert not torch.equal(first["run"]["weights"], first["plain"]["weights"])
    plain, logged = first["plain"]["logged"], first["run"]["logged"]
    assert logged[0]["loss/task"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    for entry in logged:
        assert entry["loss/density"] > 0.05
        assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])
