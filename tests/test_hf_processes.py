"""transformers' Trainer on two processes: its weights are those of the loop written out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softtrace
from softtrace import DensityLoss
from softtrace import loss as loss_module
from tests.fitting import weights
from tests.test_hf import MICRO, OPTIONS, ROWS, rows, stacked
from tests.tiny import tiny_model

RANKS, ACCUMULATE = 2, 2
CHOSEN: dict[str, Any] = {**OPTIONS, "exits": 0.4, "exit_tokens": 0.5}

SCRIPT = f"""
import sys
import torch
from tests.fitting import weights
from tests.test_hf import DensityTrainer, arguments, rows
from tests.tiny import tiny_model

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
    script, root = folder / "train.py", Path(__file__).parents[1]
    source = Path(softtrace.__file__).parents[1]
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(source)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS),
            "--standalone", str(script), str(folder), str(counted),
        ],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def by_hand(counted: bool, options: dict[str, Any]) -> Tensor:
    """Every process's batches one after the other; the term of each with its rank's draws."""
    model = tiny_model("llama", dtype=torch.float64).train()
    density = DensityLoss(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    micro = [stacked(rows()[i : i + MICRO]) for i in range(0, ROWS, MICRO)]
    for step in range(len(micro) // (RANKS * ACCUMULATE)):
        group = micro[step * RANKS * ACCUMULATE :][: RANKS * ACCUMULATE]
        targets = sum(int((each["labels"][:, 1:] != -100).sum()) for each in group)
        for number, each in enumerate(group):
            loss_module._rank = lambda number=number: number % RANKS  # type: ignore[assignment]
            with density.watching():
                logits = model(**each).logits[:, :-1].flatten(0, 1).float()
            losses = F.cross_entropy(logits, each["labels"][:, 1:].flatten(), reduction="sum")
            own = int((each["labels"][:, 1:] != -100).sum())
            task = losses / targets if counted else losses / own / len(group)
            term = density(**each, step=step, micro_step=number // RANKS).loss / len(group)
            (task + term).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("counted", [True, False], ids=["num_items_in_batch", "batch means"])
def test_two_processes_equal_the_loop_by_hand(
    tmp_path: Path, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_rank", loss_module._rank)  # put back afterwards
    first, second = trained(tmp_path, counted)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], by_hand(counted, CHOSEN), atol=1e-10, rtol=0)
    halved = by_hand(counted, {**CHOSEN, "strength": CHOSEN["strength"] / RANKS})
    assert (first["weights"] - halved).abs().max() > 1e-4
    assert [entry["step"] for entry in first["history"]] == [1, 2]
    for entry in first["history"]:
        assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])
        assert entry["loss/density"] > 0
