"""The end of a process that failed; processes that really fail are in tests/faults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from softtrace.lightning.failed_process import let_go


def test_what_was_let_go_is_still_known_and_the_watcher_sees_nothing_of_it() -> None:
    seen_by_the_watcher = ["second", "third"]
    launcher = SimpleNamespace(procs=seen_by_the_watcher)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert let_go(trainer) == ["second", "third"]
    assert seen_by_the_watcher == []
    assert let_go(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []  # type: ignore[arg-type]
