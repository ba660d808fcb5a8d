"""Validations that a strength with a budget needs: that there are any, and that none is lost.

A checkpoint that is saved at the end of a batch, as ``ModelCheckpoint(every_n_train_steps=...)``
does, comes before the validation that is due after that batch, and Lightning leaves that validation
out when it resumes from there. A strength that follows the held-out loss needs it: else a resumed
fit would end differently from a straight one.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from softtrace.errors import TrainerSetupError


def check_validates(trainer: Trainer) -> None:
    """Refuse a fit that ends before its first validation, as far as can be seen by now.

    Raises:
        TrainerSetupError: there is none, and how to have one.
    """
    empty = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
    first, steps, epochs = trainer.val_check_batch, trainer.max_steps, trainer.max_epochs or -1
    before = (trainer.check_val_every_n_epoch or 1) - 1  # epochs without any
    if before and isinstance(first, int):
        first += int(before * trainer.num_training_batches)
    if not trainer.enable_validation or empty:
        found = "no validation"
    elif isinstance(first, int) and 0 < steps * trainer.accumulate_grad_batches < first:
        found = f"its first validation after {first} batches, and ends after {steps} steps"
    elif 0 < epochs <= before:
        found = f"its first validation in epoch {before + 1}, and ends after {epochs}"
    else:
        return
    raise TrainerSetupError(
        f"budget: this fit has {found}, so the strength has nothing to follow; give it held-out "
        "data and val_check_interval (in batches, with check_val_every_n_epoch=None), some twenty "
        "validations in all, or leave the budget out"
    )


def is_due(trainer: Trainer) -> bool:
    """Whether the batch that has just ended is to be followed by a validation; not if one runs."""
    loop = trainer.fit_loop.epoch_loop
    total: Any = loop.batch_progress.total
    fetcher = trainer.fit_loop._data_fetcher
    ended = trainer.training and 0 < total.ready == total.processed
    return bool(ended and fetcher is not None and loop._should_check_val_fx(fetcher))


def validate(trainer: Trainer) -> None:
    """Run the validation of a fit, as its loop does after a batch."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first
