"""The end of a process that failed, of several: it waits for no other, and no other for it."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from softtrace.errors import SofttraceError

_GRACE = 15.0  # seconds in which other processes may end by themselves
_LOOKS = 1.0  # seconds between two looks at whether the process that started this one is there
_STARTED_BY = "SOFTTRACE_FIT_STARTED_BY"

logger = logging.getLogger(__name__)


@contextmanager
def ending_alone(trainer: Trainer) -> Iterator[None]:
    """What all processes do together: one that leaves it by an error ends without the others.

    An interrupt and ``sys.exit`` leave it too. Only a termination ends all at the same step. What
    Lightning starts inside ends with this process, see :func:`end_with_starter`.
    """
    if trainer.world_size > 1:
        os.environ[_STARTED_BY] = str(os.getpid())
    try:
        yield
    except SIGTERMException:
        raise
    except BaseException as error:
        status = _status(error)
        if trainer.world_size > 1 and isinstance(error, SystemExit) and status != _INTERRUPTED:
            logger.warning(
                "process %d ended itself (SystemExit: %s) before the fit was over, and all end",
                trainer.global_rank,
                error.code,
            )
        end_without_others(trainer, status)
        raise
    finally:
        os.environ.pop(_STARTED_BY, None)


_INTERRUPTED = 128 + signal.SIGINT


def _status(error: BaseException) -> int:
    """The exit status; never 0, after which launchers wait for the others."""
    # Lightning makes a SystemExit of an interrupt.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return _INTERRUPTED
    code = error.code if isinstance(error, SystemExit) else None
    return code if isinstance(code, int) and code else 1


def end_without_others(trainer: Trainer, status: int = 1) -> None:
    """End the processes that this one started, and let this one end with whatever it raised.

    With NCCL Lightning destroys the process group when the interpreter ends. Destroying waits for
    every other process, and those wait in a collective for this one, until a timeout of half an
    hour. So this process is over as soon as its error is said: launchers, Lightning's and torchrun,
    end the others when one of them is gone.

    Args:
        trainer: of the fit that failed.
        status: with which this process then ends.
    """
    if trainer.world_size > 1:  # before anything else: an interrupt may come while it waits
        atexit.register(_end_at_once, status)  # the last that is registered is the first that runs
    deadline = time.monotonic() + _GRACE  # most end by themselves, and say why
    processes = let_go(trainer)
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def _end_at_once(status: int) -> None:
    if torch.distributed.is_initialized():
        try:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a full disk, a reader that is gone
                    stream.flush()
        finally:
            os._exit(status)


def let_go(trainer: Trainer) -> list[Any]:
    """The processes that Lightning started from this one, which it no longer looks after.

    Its watcher asks every few seconds whether one of them ended with an error, and then kills this
    process as well, in whatever it is doing: which may be to end by itself and to say why.
    """
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    found = list(processes)
    processes.clear()  # the very list that the watcher goes through
    return found


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """What this process does when the others have nothing left to do: none of them ends it.

    Lightning's watcher would kill it, with a model half written, where another ended by an error.

    Raises:
        SofttraceError: at the end, where one of them did.
    """
    others = let_go(trainer)
    try:
        yield
        for rank, process in enumerate(others, 1):
            if status := process.poll():
                end_without_others(trainer)
                raise SofttraceError(
                    f"process {rank} ended with status {status} after the training; what this one "
                    "had to write is written"
                )
    finally:
        threading.Thread(target=_look_after, args=(others,), daemon=True).start()


def _look_after(others: list[Any]) -> None:
    """Do what Lightning's watcher does: the exit of this process may wait for one that failed."""
    while any(process.poll() is None for process in others):
        time.sleep(_LOOKS)
    if any(process.poll() for process in others):
        time.sleep(_LOOKS)  # in which this one may end by itself
        _end_at_once(1)


def end_with_starter() -> None:
    """End this process when the one of the same fit is gone that started it; else do nothing.

    Lightning's watcher lives in the first process. Where that is killed, as by a system that is
    out of memory, nobody is left to end the others, which wait for it until a timeout of half an
    hour, or at their exit, and hold their GPUs.
    """
    starter = os.environ.pop(_STARTED_BY, None)
    if starter is not None and sys.platform != "win32":  # where asking for a process may end it
        threading.Thread(target=_watch, args=(int(starter),), daemon=True).start()


def _watch(starter: int) -> None:
    # The parent shows its death also where nobody asks for its end; a wrapper may stand between.
    there = _is_parent if _is_parent(starter) else _exists
    while there(starter):
        time.sleep(_LOOKS)
    if threading.main_thread().is_alive():  # else this process is done, and ends as well
        with suppress(OSError, ValueError):
            print(
                f"softtrace fit: process {starter}, which started this one, is gone; ending",
                file=sys.stderr,
                flush=True,
            )
    os._exit(1)


def _is_parent(process: int) -> bool:
    return os.getppid() == process


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
