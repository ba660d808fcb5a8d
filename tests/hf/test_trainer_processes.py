"""transformers' Trainer on two processes: the loop written out, and a resumed training's log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.fitting import weights
from tests.support.hf_training import OPTIONS, by_hand
from tests.support.processes import script_environment
from tests.support.warm import run_ranks

RANKS, ACCUMULATE = 2, 2
CHOSEN: dict[str, Any] = {**OPTIONS, "exits": 0.4, "exit_tokens": 0.5}

SCRIPT = f"""
import sys
import torch
from tests.support.fitting import weights
from tests.support.hf_training import DensityTrainer, arguments, rows
from tests.support.tiny import tiny_model

folder, counted = sys.argv[1], sys.argv[2] == "True"
torch.set_num_threads(1)
torch.manual_seed(0)
model = tiny_model("llama", dtype=torch.float64).train()
trainer = DensityTrainer(
    model=model, args=arguments(folder, gradient_accumulation_steps={ACCUMULATE}),
    train_dataset=rows(), density={CHOSEN!r},
)
trainer.model_accepts_loss_kwargs = counted
trainer.train()
rank = trainer.args.process_index
history = [entry for entry in trainer.state.log_history if "loss" in entry]
torch.save({{"weights": weights(model), "history": history}}, f"{{folder}}/{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def trained(folder: Path, counted: bool) -> list[dict[str, Any]]:
    """What each process ended with."""
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, script, folder, counted]
    for done in run_ranks(command, RANKS, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("counted", [True, False], ids=["num_items_in_batch", "batch means"])
def test_two_processes_equal_the_loop_by_hand(tmp_path: Path, counted: bool) -> None:
    added: list[float] = []

    def by_hand_with(options: dict[str, Any]) -> Tensor:
        added.clear()
        return weights(by_hand(ACCUMULATE, counted, options, RANKS, added))

    first, second = trained(tmp_path, counted)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], by_hand_with(CHOSEN), atol=1e-10, rtol=0)
    logged = [entry["loss/density"] for entry in first["history"]]
    assert logged == pytest.approx(added, rel=1e-5)  # the mean over both processes
    halved = by_hand_with({**CHOSEN, "strength": CHOSEN["strength"] / RANKS})
    assert (first["weights"] - halved).abs().max() > 1e-4
    assert [entry["step"] for entry in first["history"]] == [1, 2]
    for entry in first["history"]:
        assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])


RESUMED = """
import sys
import torch
from tests.support.hf_training import OPTIONS, DensityTrainer, arguments, rows
from tests.support.tiny import tiny_model

folder = sys.argv[1]
torch.set_num_threads(1)
histories = {}
for step in (None, 1, 2):  # the masked runs are at the steps 0 and 3
    torch.manual_seed(0)
    trainer = DensityTrainer(
        model=tiny_model("llama", dtype=torch.float64).train(),
        args=arguments(folder, save_strategy="steps", save_steps=1),
        train_dataset=rows(), density={**OPTIONS, "every": 3},
    )
    trainer.train(step and f"{folder}/checkpoint-{step}")
    histories[step] = [entry for entry in trainer.state.log_history if "loss" in entry]
if trainer.args.process_index == 0:
    torch.save(histories, f"{folder}/histories.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_resumed_training_logs_the_mean_of_what_both_processes_measured(tmp_path: Path) -> None:
    script = tmp_path / "resumed.py"
    script.write_text(RESUMED, encoding="utf-8")
    for done in run_ranks([sys.executable, script, tmp_path], RANKS, script_environment()):
        assert done.returncode == 0, done.stderr[-3000:]
    histories = torch.load(tmp_path / "histories.pt", weights_only=True)
    straight = histories.pop(None)
    names = [name for name in straight[0] if name.startswith(("loss", "density"))]
    assert len({entry["density/soft_size"] for entry in straight}) == 2
    for resumed in histories.values():
        assert [entry["step"] for entry in resumed] == [1, 2, 3, 4]
        for entry, wanted in zip(resumed, straight, strict=True):
            assert [entry[name] for name in names] == [wanted[name] for name in names]
