"""Every way to fit that the Lightning integration works with, by the names of its table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, strategies
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from tests.support.fitting import Batch, OnlyBatch, Tuner, batches, fit, forget_warnings
from tests.support.tiny import checkpointed, tiny_model

EPOCH = len(batches())
STEPS = 6  # into the second epoch of four batches
LATER = 14  # what some rows wait for comes in the first three of them
OPTIONS: dict[str, Any] = {"share": 0.5, "crop": 6, "exits": 0.3}


class Validated(Tuner):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(**batch).loss, batch_size=len(batch["input_ids"]))


class Checkpointed(Tuner):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        checkpointed(self.model, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Compiled(Tuner):
    def __init__(self) -> None:
        super().__init__()
        self.model.compile(backend="eager")


class Configured(Tuner):
    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = tiny_model("llama").train()


class Closures(Tuner):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=2)


class Dictionary(Tuner):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)}


class Nothing(Tuner):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class WithRate(Tuner):
    """What the finders turn: a learning rate and a batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        rows = [
            {name: value[row] for name, value in batch.items()}
            for batch in batches().batches
            for row in range(4)
        ]
        return DataLoader(rows, batch_size=self.batch_size)


class Way:
    """One way to fit.

    Args:
        module: what is fitted.
        callbacks: made anew for every fit.
        own_data: the module brings its batches.
        twice: fit it again, each time for half of the steps.
        whole_epochs: last as many as hold the steps, for what has to know when it ends.
        steps: how many, unless told otherwise.
        options: of the Trainer, made anew for every fit.
    """

    def __init__(
        self,
        module: Callable[[], Tuner] = Tuner,
        callbacks: Callable[[], list[Callback]] = list,
        own_data: bool = False,
        twice: bool = False,
        whole_epochs: bool = False,
        steps: int = STEPS,
        **options: Any,
    ) -> None:
        self.module, self.callbacks, self.own_data = module, callbacks, own_data
        self.twice, self.whole_epochs, self.options = twice, whole_epochs, options
        self.steps = steps

    def fit(self, *penalty: Callback, steps: int | None = None) -> tuple[Tuner, Trainer]:
        steps = self.steps if steps is None else steps
        module = self.module()
        options = {"max_steps": steps // (1 + self.twice), "max_epochs": -1, **self.options}
        if self.whole_epochs:
            options |= {"max_steps": -1, "max_epochs": math.ceil(steps / EPOCH)}
        options = {name: v() if callable(v) else v for name, v in options.items()}
        for _ in range(1 + self.twice):
            forget_warnings()
            if self.own_data:
                torch.manual_seed(0)
                usual = {"enable_checkpointing": False, "limit_val_batches": 0, "logger": False}
                fitted = Trainer(
                    callbacks=[*penalty, *self.callbacks()], accelerator="cpu", devices=1,
                    enable_progress_bar=False, enable_model_summary=False, **usual, **options,
                )  # fmt: skip
                fitted.fit(module)
            else:
                fitted = fit(module, *penalty, *self.callbacks(), **options)
        return module, fitted


def half_mixed() -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


WAYS: dict[str, Way] = {
    "SingleDeviceStrategy": Way(strategy=lambda: strategies.SingleDeviceStrategy("cpu")),
    "32-true": Way(precision="32-true"),
    "64-true": Way(precision="64-true"),
    "bf16-true": Way(precision="bf16-true"),
    "bf16-mixed": Way(precision="bf16-mixed"),
    "16-mixed": Way(plugins=half_mixed),
    "accumulate_grad_batches": Way(accumulate_grad_batches=3),
    "gradient_clip_val": Way(gradient_clip_val=0.1),
    "gradient_clip_algorithm": Way(gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    "validation": Way(Validated, limit_val_batches=1, val_check_interval=2),
    "fast_dev_run": Way(fast_dev_run=3),
    "fit twice": Way(twice=True, steps=LATER),
    "StochasticWeightAveraging": Way(
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
        whole_epochs=True,
        steps=LATER,
    ),
    "EMAWeightAveraging": Way(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "LearningRateFinder": Way(
        WithRate, lambda: [LearningRateFinder(num_training_steps=6)], own_data=True
    ),
    "BatchSizeFinder": Way(
        WithRate, lambda: [BatchSizeFinder(steps_per_trial=1, max_trials=2)], own_data=True
    ),
    "GradientAccumulationScheduler": Way(
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 2: 2})], steps=LATER
    ),
    "activation checkpointing, not reentrant": Way(Checkpointed),
    "torch.compile in place": Way(Compiled),
    "configure_model": Way(Configured),
    "closures that run repeatedly (LBFGS)": Way(Closures),
    "training_step returns a dict": Way(Dictionary),
    "training_step returns None": Way(Nothing),
    "training_step(batch)": Way(OnlyBatch),
}  # fmt: skip
