"""A SIGTERM that reaches one of several processes ends them all, at the same step."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from softtrace.lightning.failed_process import let_go


class EndTogether(Callback):
    """Ends all processes at the next step after any of them got a SIGTERM.

    Lightning's own handler takes part in a collective from inside the signal handler: a process
    that the others do not join there waits until a timeout of half an hour. Here the handler only
    notes the signal, and the processes ask each other before every batch. With one process
    Lightning's is right, and nothing is done.
    """

    def __init__(self) -> None:
        self._asked = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have Lightning register this handler as its own: a sanity check comes before training."""
        self._asked = False
        if trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._note  # type: ignore[assignment,method-assign]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler; it puts back all handlers at the end of a fit."""
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self._asked = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raise in every process if any was asked to end."""
        if trainer.world_size == 1:
            return
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            let_go(trainer)
            trainer.strategy.barrier()  # before anybody ends
            raise SIGTERMException
