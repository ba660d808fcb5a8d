"""The end of a process that failed; processes that really fail are in tests/faults."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from softtrace.errors import SofttraceError
from softtrace.lightning import failed_process
from softtrace.lightning.failed_process import (
    end_with_starter,
    ending_alone,
    let_go,
    undisturbed,
)

Exits = list[Callable[[], None]]


def trainer_of(count: int, procs: tuple[Any, ...] = ()) -> Any:
    launcher = SimpleNamespace(procs=list(procs))
    return SimpleNamespace(
        world_size=count, global_rank=1, strategy=SimpleNamespace(launcher=launcher)
    )


class Ended(BaseException):
    """What stands for the end of this process."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    """What would run at the end of this interpreter; ending it at once raises the status."""
    found: Exits = []

    def register(function: Any, *args: Any) -> None:
        found.append(lambda: function(*args))

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(atexit, "register", register)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return found


def test_what_was_let_go_is_still_known_and_the_watcher_sees_nothing_of_it() -> None:
    seen_by_the_watcher = ["second", "third"]
    launcher = SimpleNamespace(procs=seen_by_the_watcher)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert let_go(trainer) == ["second", "third"]
    assert seen_by_the_watcher == []
    assert let_go(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []  # type: ignore[arg-type]


def interrupted() -> SystemExit:
    """As Lightning raises it."""
    end = SystemExit(1)
    end.__context__ = KeyboardInterrupt()
    return end


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("planned"), 1), (KeyboardInterrupt(), 130), (interrupted(), 130),
        (SystemExit(7), 7), (SystemExit(0), 1), (SystemExit(None), 1), (SystemExit("why"), 1),
    ],
)  # fmt: skip
def test_whatever_ends_one_of_several_processes_ends_it_at_once(
    exits: Exits, error: BaseException, status: int
) -> None:
    with pytest.raises(type(error)), ending_alone(trainer_of(2)):
        raise error
    with pytest.raises(Ended, match=f"^{status}$"):
        exits[-1]()


def test_nothing_is_ended_of_one_process_nor_of_several_that_end_together(exits: Exits) -> None:
    with pytest.raises(SystemExit), ending_alone(trainer_of(1)):
        raise SystemExit(0)
    with pytest.raises(SIGTERMException), ending_alone(trainer_of(2)):
        raise SIGTERMException
    with ending_alone(trainer_of(2)):
        pass
    assert exits == []


def test_an_interrupt_while_others_are_waited_for_ends_them_and_this_one(exits: Exits) -> None:
    class Other:
        killed = False

        def wait(self, _: float) -> None:
            raise KeyboardInterrupt

        def poll(self) -> None:
            return None

        def kill(self) -> None:
            self.killed = True

    other = Other()
    with pytest.raises(KeyboardInterrupt), ending_alone(trainer_of(2, (other,))):
        raise ValueError("planned")
    assert other.killed
    with pytest.raises(Ended):
        exits[-1]()


def test_it_ends_also_where_nothing_can_be_written(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="planned"), ending_alone(trainer_of(2)):
        raise ValueError("planned")
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(flush=full))
    with pytest.raises(Ended):
        exits[-1]()


def test_only_what_is_started_inside_knows_who_started_it() -> None:
    with ending_alone(trainer_of(2)):
        assert os.environ[failed_process._STARTED_BY] == str(os.getpid())
    assert failed_process._STARTED_BY not in os.environ
    with ending_alone(trainer_of(1)):
        assert failed_process._STARTED_BY not in os.environ


@pytest.mark.parametrize("between", [False, True])
def test_a_process_ends_when_the_one_that_started_it_is_gone(
    exits: Exits,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    between: bool,
) -> None:
    """Also where another process stands between the two, as of a server that forks."""
    answers = iter([True, True, False])

    def exists(process: int, number: int) -> None:
        assert (process, number) == (42, 0)
        if not next(answers):
            raise ProcessLookupError

    monkeypatch.setattr(os, "getppid", lambda: 7 if between else 42 if next(answers) else 1)
    monkeypatch.setattr(os, "kill", exists)
    monkeypatch.setattr(failed_process, "_LOOKS", 0.0)
    with pytest.raises(Ended):
        failed_process._watch(42)
    assert "process 42, which started this one, is gone" in capsys.readouterr().err
    assert next(answers, None) is None
    assert exits == []


def test_a_process_that_was_started_by_nobody_of_its_fit_watches_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched: list[int] = []
    monkeypatch.setattr(failed_process, "_watch", watched.append)
    end_with_starter()
    assert watched == []


@pytest.mark.parametrize("status", [0, None, 1, -9])
def test_what_the_others_leave_to_this_process_is_done_whatever_they_end_with(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    looked_after: list[list[Any]] = []
    monkeypatch.setattr(failed_process, "_look_after", looked_after.append)
    other = SimpleNamespace(poll=lambda: status)
    trainer, written = trainer_of(2, (other,)), []
    failed = status not in (0, None)
    expected = pytest.raises(SofttraceError, match="process 1 ended") if failed else nullcontext()
    with expected, undisturbed(trainer):
        assert trainer.strategy.launcher.procs == []  # that Lightning's watcher goes through
        written.append("model")
    assert written == ["model"]
    assert looked_after == [[other]]
    assert bool(exits) == failed  # whose exit would wait


def test_a_process_that_waits_at_its_exit_for_one_that_failed_ends(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_process, "_LOOKS", 0.0)
    statuses = iter([None, None, 1, 1])
    with pytest.raises(Ended):
        failed_process._look_after([SimpleNamespace(poll=lambda: next(statuses))])
    failed_process._look_after([SimpleNamespace(poll=lambda: 0)])
    assert exits == []
