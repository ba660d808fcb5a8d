"""One step of every integration on a real model: each takes the step of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from softtrace import DensityLoss
from softtrace.hf import with_density
from softtrace.lightning import DensityPenalty
from tests.support.fitting import Batches, Tuner, fit
from tests.support.real import SMOLLM
from tests.support.real_steps import RATE, Start, loop

pytestmark = pytest.mark.real

#: of the step; some integrations add the two gradients up one by one, and bfloat16 rounds each
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


class Descent(Tuner):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def under_lightning(model: Any, ids: Tensor, folder: Path) -> None:
    data = Batches({"input_ids": ids, "labels": ids})
    fit(Descent(model=model), DensityPenalty(), data=data, max_steps=1, default_root_dir=folder)


def by_trainer(model: Any, ids: Tensor, folder: Path) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=len(ids), learning_rate=RATE,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer: Any = with_density(Trainer)(
        model=model, args=arguments, train_dataset=rows, density={}
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss/density"] > 0.1
    assert logged["loss"] == pytest.approx(logged["loss/task"] + logged["loss/density"], rel=1e-3)


def under_accelerate(bare: Any, ids: Tensor, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    density_loss = DensityLoss(bare)
    optimizer = torch.optim.SGD(bare.parameters(), lr=RATE)
    model, optimizer = accelerator.prepare(bare, optimizer)
    with density_loss.watching(model, 0) as watched:
        task = model(input_ids=ids, labels=ids).loss
    accelerator.backward(task + density_loss(ids, step=0, watched=watched).loss)
    optimizer.step()


INTEGRATIONS = (under_lightning, by_trainer, under_accelerate)


@pytest.mark.parametrize(
    ("dtype", "length", "integrations"),
    [
        ("float32", 64, INTEGRATIONS),
        ("bfloat16", 16, INTEGRATIONS[:1]),  # which a CPU may multiply at an eighth of the speed
    ],
    ids=["float32", "bfloat16"],
)
def test_every_integration_takes_the_step_of_a_plain_loop(
    dtype: str, length: int, integrations: tuple[Callable[..., None], ...], tmp_path: Path
) -> None:
    start = Start(SMOLLM, dtype, length)
    wanted = start.stepped(loop, tmp_path)
    assert wanted.isfinite().all()
    for train in integrations:
        found = start.stepped(train, tmp_path)
        off = float((found - wanted).norm() / (wanted - start.before).norm())
        assert off < ALLOWED[dtype], train.__name__
