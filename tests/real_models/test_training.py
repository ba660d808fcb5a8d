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


class Start:
    """A model to begin from again and again: what was proven of it holds for all its steps."""

    def __init__(self, name: str, dtype: str, length: int) -> None:
        self.model = real_model(name, dtype)
        self.ids = pack(documents(), real_tokenizer(name), length)[:1]
        self._weights = [each.detach().clone() for each in self.model.parameters()]
        self.before = weights(self.model).float()

    def stepped(self, train: Callable[..., None], folder: Path) -> Tensor:
        """All weights after one step from the start on one block of the text."""
        with torch.no_grad():
            for each, first in zip(self.model.parameters(), self._weights, strict=True):
                each.copy_(first)
        self.model.train().zero_grad()
        assert torch.equal(weights(self.model).float(), self.before)
        train(self.model, self.ids, folder)
        return weights(self.model).float()


@pytest.mark.parametrize(
    ("name", "dtype", "length"),
    [  # the others are below; a CPU may multiply bfloat16 at an eighth of the speed of float32
        (SMOLLM, "bfloat16", 32),
        (GEMMA, "float32", LONG),
    ],
)
def test_a_plain_loop_takes_a_step(name: str, dtype: str, length: int, tmp_path: Path) -> None:
    start = Start(name, dtype, length)
    after = start.stepped(loop, tmp_path)
    assert after.isfinite().all()
    changed = (after != start.before).float().mean()
    assert changed > 1e-3  # tokens that do not occur stay, and bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "length"), [(SMOLLM, "float32", 64), (GEMMA, "bfloat16", 16)]
)
def test_every_integration_takes_the_step_of_a_plain_loop(
    name: str, dtype: str, length: int, tmp_path: Path
) -> None:
    start = Start(name, dtype, length)
    wanted = start.stepped(loop, tmp_path)
    for train in (under_lightning, by_trainer, under_accelerate):
        found = start.stepped(train, tmp_path)
        off = float((found - wanted).norm() / (wanted - start.before).norm())
        assert off < ALLOWED[dtype], train.__name__
