"""The end of several processes, without those: who is watched for when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from softtrace.lightning.sigterm import EndTogether, let_go


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


def test_what_was_let_go_is_still_known_and_the_watcher_sees_nothing_of_it() -> None:
    strategy = Strategy()
    seen_by_the_watcher = strategy.launcher.procs
    trainer: Any = SimpleNamespace(strategy=strategy)
    assert let_go(trainer) == ["second", "third"]
    assert seen_by_the_watcher == []
    assert let_go(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []  # type: ignore[arg-type]
