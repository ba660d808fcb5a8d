"""The table of what the Lightning door works with, walked row by row.

Every supported row fits at strength 0 bit by bit as without the callback, and at another
strength to other, finite weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
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
from torch import Tensor
from torch.utils.data import DataLoader

from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.lightning import DensityPenalty
from softtrace.support import LIGHTNING, check_strategy
from tests.fitting import (
    Batch,
    Batches,
    Manual,
    OnlyBatch,
    TakesIterator,
    Tuner,
    batches,
    fit,
    forget_warnings,
    weights,
)
from tests.tiny import checkpointed, tiny_model

pytestmark = pytest.mark.thorough

EPOCH = len(batches())
STEPS = 14  # what a row waits for comes in the first three epochs of four batches
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
        options: of the Trainer, made anew for every fit.
    """

    def __init__(
        self,
        module: Callable[[], Tuner] = Tuner,
        callbacks: Callable[[], list[Callback]] = list,
        own_data: bool = False,
        twice: bool = False,
        whole_epochs: bool = False,
        **options: Any,
    ) -> None:
        self.module, self.callbacks, self.own_data = module, callbacks, own_data
        self.twice, self.whole_epochs, self.options = twice, whole_epochs, options

    def fit(self, *penalty: Callback, steps: int = STEPS) -> tuple[Tuner, Trainer]:
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
    "fit twice": Way(twice=True),
    "StochasticWeightAveraging": Way(
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
        whole_epochs=True,
    ),
    "EMAWeightAveraging": Way(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "LearningRateFinder": Way(
        WithRate, lambda: [LearningRateFinder(num_training_steps=6)], own_data=True
    ),
    "BatchSizeFinder": Way(
        WithRate, lambda: [BatchSizeFinder(steps_per_trial=1, max_trials=2)], own_data=True
    ),
    "GradientAccumulationScheduler": Way(
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 2: 2})]
    ),
    "activation checkpointing, not reentrant": Way(Checkpointed),
    "torch.compile in place": Way(Compiled),
    "configure_model": Way(Configured),
    "closures that run repeatedly (LBFGS)": Way(Closures),
    "training_step returns a dict": Way(Dictionary),
    "training_step returns None": Way(Nothing),
    "training_step(batch)": Way(OnlyBatch),
}  # fmt: skip

#: DDP has tests of its own, in several processes
ELSEWHERE = {"DDPStrategy"}

#: refused rows that are no strategies: what is fitted, and what the error says
REFUSED: dict[str, tuple[type[Tuner], type[Exception], str]] = {
    "training_step(dataloader_iter)": (TakesIterator, TrainerSetupError, "takes dataloader_iter"),
    "manual optimisation": (Manual, TrainerSetupError, "uses manual optimisation"),
    "activation checkpointing, reentrant": (Reentrant, InvalidInputError, "use_reentrant=True"),
}


@pytest.fixture(autouse=True)
def _other_peoples_warnings() -> Iterator[None]:
    """Of finders, of half precision on a CPU, of skipped batches: Lightning's own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_row_is_walked() -> None:
    supported = {row.name for row in LIGHTNING if row.refused is None}
    assert supported == set(WAYS) | ELSEWHERE
    refused = {row.name for row in LIGHTNING if row.refused and row.kind != "strategy"}
    assert refused == set(REFUSED)
    assert len({row.name for row in LIGHTNING}) == len(LIGHTNING)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_strength_0_is_inert_and_others_are_not(way: Way) -> None:
    plain, fitted = way.fit()
    silent, _ = way.fit(DensityPenalty(0.0, **OPTIONS))
    loud, penalised = way.fit(DensityPenalty(0.6, **OPTIONS))
    assert fitted.global_step == penalised.global_step > 0
    assert (weights(silent) - weights(plain)).abs().max() == 0.0
    assert torch.isfinite(weights(loud)).all()
    assert not torch.equal(weights(loud), weights(plain))
    assert "training_step" not in vars(loud)


def test_accumulation_is_rescheduled_before_the_fits_end() -> None:
    way, without = WAYS["GradientAccumulationScheduler"].fit()[0], Way().fit()[0]
    assert not torch.equal(weights(way), weights(without))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules_say_why(name: str) -> None:
    kind, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fit(kind(), DensityPenalty(0.6))


def test_reentrant_checkpointing_is_refused_for_its_exits_alone() -> None:
    for reentrant in (Reentrant, Checkpointed):
        module = reentrant()
        fit(module, DensityPenalty(0.6, exits=0.0))
        found = weights(module)
        if reentrant is Reentrant:
            first = found
    torch.testing.assert_close(first, found, atol=1e-5, rtol=1e-4)


def test_strategies_that_are_not_supported_are_refused_by_name() -> None:
    for row in LIGHTNING:
        if row.kind == "strategy" and row.refused:
            with pytest.raises(TrainerSetupError, match=f"found {row.name} .*supported are Single"):
                check_strategy(row.name)
            check_strategy(row.name, allow_untested=True)

    class Own(strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(
        TrainerSetupError, match=r"found Own \(it was never tested\).*allow_untested"
    ):
        fit(Tuner(), DensityPenalty(), strategy=Own("cpu"))
    fit(Tuner(), DensityPenalty(0.0), strategy=Own("cpu"))
    own, usual = Tuner(), Tuner()
    fit(own, DensityPenalty(allow_untested=True), strategy=Own("cpu"))
    fit(usual, DensityPenalty())
    assert torch.equal(weights(own), weights(usual))


def test_closures_of_a_step_see_the_same_term() -> None:
    seen: list[tuple[int, float]] = []

    class Noting(DensityPenalty):
        def _log(self, pl_module: Any, task: Tensor, term: Any) -> None:
            seen.append((pl_module.global_step, float(term.distortion)))
            super()._log(pl_module, task, term)

    class Still(Closures):
        """Its steps go nowhere, so that only the draws could differ."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(
                self.parameters(), lr=0.0, max_iter=3, tolerance_grad=0.0, tolerance_change=-1.0
            )

    fit(Still(), Noting(0.6, **OPTIONS), data=Batches(*batches().batches[:2]))
    by_step: dict[int, set[float]] = {}
    for step, distortion in seen:
        by_step.setdefault(step, set()).add(distortion)
    assert len(seen) > 2 * len(by_step)  # closures did run repeatedly
    assert all(len(each) == 1 for each in by_step.values())
