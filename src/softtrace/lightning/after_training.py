"""What is measured once a training has ended, on the device that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils.memory import clear_device_cache
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy


@contextmanager
def on_training_device(model: Any, trained: LightningModule, strategy: Strategy) -> Iterator[None]:
    """Move a model to the device of the training while it is measured, which is slow on a CPU.

    Gradients, which move with a model, and optimisers' states, which Lightning has moved to main
    memory by now, are let go of first: they are as large as two more models.

    Args:
        model: that is to be read; it is on the CPU afterwards.
        trained: the module of the training, whose gradients are let go of.
        strategy: of its trainer.
    """
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    trained.zero_grad(set_to_none=True)
    clear_device_cache(garbage_collection=True)
    try:
        model.to(strategy.root_device)
        yield
    finally:
        model.to("cpu")
        clear_device_cache()
