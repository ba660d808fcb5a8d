"""One step of every integration on real models: each takes the step of a plain loop."""

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
from softtrace.data import pack
from softtrace.hf import with_density
from softtrace.lightning import DensityPenalty
from tests.support.fitting import Batches, Tuner, fit, weights
from tests.support.real import (
    GEMMA,
    LONG,
    SMOLLM,
    documents,
    real_model,
    real_tokenizer,
)

pytestmark = pytest.mark.real

RATE = 0.01
#: of the step; some integrations add the two gradients up one by one, and bfloat16 rounds each
ALLOWED = {"float32": 1e-3, "bfloat16": 0.1}


class Descent(Tuner):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def loop(model: Any, ids: Tensor, folder: Path) -> None:
    density_loss = DensityLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with density_loss.watching(model, 0) as watched:
        task = model(input_ids=ids, labels=ids).loss
    term = density_loss(ids, step=0, watched=watched)
    (task + term.loss).backward()
    optimizer.step()
    assert term.skipped is None
    assert 0 < float(term.distortion) <= 1
    assert term.exit_distance is not None
    assert 0 < float(term.exit_distance) < 30
    assert float(term.loss.detach()) > 0.1


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


def stepped(
    name: str, dtype: str, length: int, train: Callable[..., None], folder: Path
) -> tuple[Tensor, Tensor]:
    """All weights before and after one step on one block of the text."""
    model = real_model(name, dtype).train()
    before = weights(model).float()
    train(model, pack(documents(), real_tokenizer(name), length)[:1], folder)
    return before, weights(model).float()


@pytest.mark.parametrize(
    ("name", "dtype", "length"),
    [  # of 64 tokens the others are below
        (SMOLLM, "bfloat16", 64),
        (GEMMA, "float32", 64),
        (SMOLLM, "float32", LONG),
        (GEMMA, "bfloat16", LONG),
    ],
)
def test_a_plain_loop_takes_a_step(name: str, dtype: str, length: int, tmp_path: Path) -> None:
    before, after = stepped(name, dtype, length, loop, tmp_path)
    assert after.isfinite().all()
    assert (after != before).float().mean() > 1e-3  # tokens that do not occur stay, and bfloat16


@pytest.mark.parametrize(("name", "dtype"), [(SMOLLM, "float32"), (GEMMA, "bfloat16")])
def test_every_integration_takes_the_step_of_a_plain_loop(
    name: str, dtype: str, tmp_path: Path
) -> None:
    before, wanted = stepped(name, dtype, 64, loop, tmp_path)
    for train in (under_lightning, by_trainer, under_accelerate):
        _, found = stepped(name, dtype, 64, train, tmp_path)
        off = float((found - wanted).norm() / (wanted - before).norm())
        assert off < ALLOWED[dtype], train.__name__
