"""The progress of a fit in optimiser steps, of as many as it will take.

Lightning's own bars count batches, and take ``max_steps`` for a number of batches: with
accumulation they show more done than there are to do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_SECONDS, _SECONDS_OF_LOG = 0.1, 10.0  # between two lines, which a file keeps one after another


class StepProgress(TQDMProgressBar):
    """Optimiser steps done of steps to do: of all epochs, and of what a resumed fit did before.

    Where only a time ends the fit, there is no number of steps to do.
    """

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the training."""
        return Tqdm(
            desc=_epoch(self.trainer),  # a resumed one does not begin again
            total=_steps_of(self.trainer),
            initial=self.trainer.global_step,
            unit="step",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            mininterval=_interval(),
        )

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of a validation, which is not written into a file at every batch."""
        bar = super().init_validation_tqdm()
        vars(bar)["mininterval"] = _interval()
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the epoch; the count of steps does not begin anew."""
        bar: Any = self.train_progress_bar
        bar.set_description(_epoch(trainer), refresh=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Show the steps that are done."""
        bar: Any = self.train_progress_bar
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batches that are done."""
        bar: Any = self.val_progress_bar
        bar.update(batch_idx + 1 - bar.n)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Leave the bar's line, so that the error has its own."""
        bars: list[Any] = [self._val_progress_bar, self._train_progress_bar]
        for bar in bars:
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The losses, by names that fit 80 columns; not the number of the log's folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("loss/"): value for name, value in metrics.items()}


def progress_of(options: Mapping[str, Any], callbacks: list[Callback]) -> list[Callback]:
    """The bar that a fit shows unless its options ask for another one or for none.

    Args:
        options: of the trainer.
        callbacks: that it was given.
    """
    given = any(isinstance(each, ProgressBar) for each in callbacks)
    unwanted = options.get("enable_progress_bar") is False or options.get("barebones")
    return [] if given or unwanted else [StepProgress()]


def _epoch(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}"


def _steps_of(trainer: Trainer) -> int | None:
    """How many steps the whole fit takes; None where that is not known."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    changes = (each for each in callbacks if isinstance(each, GradientAccumulationScheduler))
    if trainer.max_epochs != -1 and any(changes):
        return None  # accumulation changes with the epoch, which Lightning's estimate leaves out
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < math.inf else None


def _interval() -> float:
    """Seconds between two lines of a bar at least."""
    return _SECONDS if sys.stdout.isatty() else _SECONDS_OF_LOG
