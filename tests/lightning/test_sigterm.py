"""The end of several processes, without those: who is watched for when."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from softtrace.lightning.sigterm import EndTogether


class Strategy:
    """Of a process that another one asked to end."""

    def __init__(self) -> None:
        self.launcher = SimpleNamespace(procs=["second", "third"])
        self.watched: list[list[Any]] = []

    def reduce_boolean_decision(self, asked: bool, all: bool) -> bool:
        assert not asked
        assert not all
        return True

    def barrier(self) -> None:
        self.watched.append(list(self.launcher.procs))


def test_nobody_is_watched_for_when_all_end_together() -> None:
    """Lightning's watcher kills a process that is about to end when another one ended first."""
    strategy = Strategy()
    trainer: Any = SimpleNamespace(world_size=3, strategy=strategy)
    with pytest.raises(SIGTERMException):
        EndTogether().on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
    assert strategy.watched == [[]]


def test_lightning_registers_no_handler_that_waits_for_others() -> None:
    """From before the sanity check on; what is noted there ends the fit at the first batch."""
    trainer, callback = Trainer(accelerator="cpu", logger=False), EndTogether()
    several: Any = SimpleNamespace(world_size=2, _signal_connector=trainer._signal_connector)
    before = signal.getsignal(signal.SIGTERM)
    callback.setup(several, None, "fit")  # type: ignore[arg-type]
    trainer._signal_connector.register_signal_handlers()
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        trainer._signal_connector.teardown()
    assert callback._asked
    assert not trainer.received_sigterm  # as Lightning's own handler notes it, after a collective
    assert signal.getsignal(signal.SIGTERM) is before
