"""The end of a process that failed, of several: it waits for no other, and no other for it."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Trainer

_GRACE = 15.0  # seconds in which other processes may end by themselves


def end_without_others(trainer: Trainer) -> None:
    """End the processes that this one started, and let this one end with whatever it raised.

    With NCCL Lightning destroys the process group when the interpreter ends. Destroying waits for
    every other process, and those wait in a collective for this one, until a timeout of half an
    hour. So this process is over as soon as its error is said: launchers, Lightning's and torchrun,
    end the others when one of them is gone.
    """
    deadline = time.monotonic() + _GRACE  # most end by themselves, and say why
    for process in let_go(trainer):
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
    if trainer.world_size > 1:
        atexit.register(_end_at_once)  # the last that is registered is the first that runs


def _end_at_once() -> None:
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def let_go(trainer: Trainer) -> list[Any]:
    """The processes that Lightning started from this one, which it no longer looks after.

    Its watcher asks every few seconds whether one of them ended with an error, and then kills this
    process as well, in whatever it is doing: which may be to end by itself and to say why.
    """
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    found = list(processes)
    processes.clear()  # the very list that the watcher goes through
    return found
