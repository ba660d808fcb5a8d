"""A real ``softtrace fit`` in a process of its own, with one thing going wrong.

    python -m tests.faults.job FAULT AT RANK [options of softtrace fit]

FAULT happens at the optimiser step AT, on the process RANK.
"""

from __future__ import annotations

import atexit
import faulthandler
import io
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.checkpoint import state_dict

from softtrace import cli, files
from softtrace.cli.fit import FitCLI
from softtrace.lightning import failed_process

STARTED_BY = os.getppid()


class Planned(RuntimeError):
    pass


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(trainer: Trainer, module: Any) -> None:
    """At the next rename of a file that was written: everything is there but its name."""
    files.os = type("Os", (), {**vars(os), "replace": staticmethod(kill)})  # type: ignore[attr-defined]


def kill_in_write(trainer: Trainer, module: Any) -> None:
    """While the next checkpoint is being written: half of it gets to wherever it is written."""
    save = torch.save

    def half(checkpoint: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        kill()

    torch.save = half


def terminate(trainer: Trainer, module: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(trainer: Trainer, module: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def disk_full(trainer: Trainer, module: Any) -> None:
    """No file may grow beyond a few kilobytes from here on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def spoil(trainer: Trainer, module: Any) -> None:
    with torch.no_grad():
        next(module.model.parameters())[5, 0] = math.nan


def fail(trainer: Trainer, module: Any) -> None:
    raise Planned(f"planned failure of rank {trainer.global_rank}")


def fail_where_the_exit_waits(trainer: Trainer, module: Any) -> None:
    """As NCCL's way to end does: for processes that are in a collective, and wait for this one."""
    atexit.register(stay)
    fail(trainer, module)


def interrupt_where_the_exit_waits(trainer: Trainer, module: Any) -> None:
    atexit.register(stay)
    interrupt(trainer, module)


def leave_where_the_exit_waits(trainer: Trainer, module: Any) -> None:
    """As if all were well: a launcher continues, and waits for the others."""
    atexit.register(stay)
    sys.exit(0)


def kill_the_first(trainer: Trainer, module: Any) -> None:
    """The process that started this one; then wait for it as in a collective of NCCL's."""
    os.kill(STARTED_BY, signal.SIGKILL)
    while True:
        time.sleep(0.1)


def gather_late(trainer: Trainer, module: Any) -> None:
    """As with NCCL, where processes have queued their part long before the first one has it."""
    gather = state_dict.get_model_state_dict

    def late(*args: Any, **options: Any) -> Any:
        found = gather(*args, **options)
        time.sleep(3)
        if any(each.poll() is not None for each in trainer.strategy.launcher.procs):  # type: ignore[union-attr]
            raise Planned("a process ended before its part was gathered")
        return found

    state_dict.get_model_state_dict = late


def dawdle(trainer: Trainer, module: Any) -> None:
    time.sleep(3)


def stay(*_: Any) -> None:
    """Go no further, until killed; or until whoever would do that is no more."""
    while os.getppid() == STARTED_BY:
        time.sleep(0.1)


FAULTS: dict[str, Callable[[Trainer, Any], None]] = {
    "none": lambda *_: None,
    "kill": kill,
    "kill in save": kill_in_save,
    "kill in write": kill_in_write,
    "terminate": terminate,
    "interrupt": interrupt,
    "disk full": disk_full,
    "nan": spoil,
    "raise": fail,
    "raise, and wait": fail_where_the_exit_waits,
    "interrupt, and wait": interrupt_where_the_exit_waits,
    "leave, and wait": leave_where_the_exit_waits,
    "kill the first": kill_the_first,
    "gather late": gather_late,
    "slow": dawdle,
    "stay": stay,
}


class Inject(Callback):
    def __init__(self, fault: str, at: int, rank: int) -> None:
        self.fault, self.at, self.rank = FAULTS[fault], at, rank

    def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.at and trainer.global_rank == self.rank:
            self.fault(trainer, module)


def main() -> int:
    faulthandler.enable()
    fault, at, rank, *words = sys.argv[1:]
    # a shell without job control starts what runs in its background deaf to SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == "0":  # which says why itself: of its 15 seconds nothing happens in the others
        failed_process._GRACE = 3.0
    start = FitCLI.instantiate_trainer

    def with_fault(self: FitCLI, **kwargs: Any) -> Trainer:
        trainer = start(self, **kwargs)
        trainer.callbacks.append(Inject(fault, int(at), int(rank)))  # type: ignore[attr-defined]
        return trainer

    FitCLI.instantiate_trainer = with_fault  # type: ignore[method-assign]
    return cli.main(["fit", *words])


if __name__ == "__main__":
    sys.exit(main())
