"""Random numbers that are functions of the step: a fit that resumes needs no random state.

A checkpoint of PyTorch's generators would not do it: validation, another number of processes or a
step that was lost between checkpoint and interruption all move them.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from softtrace.lightning.wrapped_step import micro_step_of
from softtrace.loss.draws import hashed_seed


class StepSeed(Callback):
    """Seeds PyTorch before every training step from (seed, step, accumulated batch, rank).

    Dropout and whatever else a step draws are then the same in a resumed fit as in one that was
    never interrupted. The seed is kept in checkpoints: a fit continues with the one it began with.

    Args:
        seed: any integer.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators of all devices."""
        step = (trainer.global_step, micro_step_of(trainer), trainer.global_rank)
        torch.manual_seed(hashed_seed("step", self.seed, *step))

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the interrupted fit."""
        self.seed = int(state_dict["seed"])
