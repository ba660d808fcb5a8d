"""Several processes of one evaluation, through Accelerate; one process needs nothing of it."""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate.state import PartialState
from accelerate.utils.operations import broadcast_object_list

from softtrace.errors import InvalidInputError
from softtrace.libraries import refusals
from softtrace.model.devices import best_device, device_of
from softtrace.processes import of_another, raise_everywhere, told

T = TypeVar("T")

# The fastest process waits for the slowest, and where memory ran out that one can be far behind.
_PATIENCE = datetime.timedelta(days=7)


def launched() -> int:
    """How many processes ``accelerate launch`` or ``torchrun`` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))  # Accelerate's own state would stay


def check_one_process(command: str) -> None:
    """Refuse several processes for a command that does not divide its work.

    Raises:
        InvalidInputError: what to do instead.
    """
    if launched() > 1:
        raise InvalidInputError(
            f"WORLD_SIZE: found {launched()} processes in the environment, and {command} takes "
            "one; start it without torchrun. For a model larger than one device pass --device_map "
            "auto; a model that was trained in parts has to be saved whole first. Several "
            "processes divide the blocks of softtrace evaluate"
        )


class Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    Every one of them has to make this, and to call the same methods in the same order.

    Args:
        device: "auto" (each process its own accelerator, else the CPU), "cpu", or a kind of
            device, with a number for one process only.

    Attributes:
        count: how many there are.
        index: of this one; 0 is the main one.
        device: of this one.

    Raises:
        InvalidInputError: a numbered device for several processes, or one that is not there; or
            other than the launched number of processes.
    """

    def __init__(self, device: str) -> None:
        self._state: Any = None
        count = launched()
        if count < 2:
            self.count, self.index = 1, 0
            self.device = device_of(device)
            return
        # Left alone without an accelerator, Accelerate lets every process think it is the only one.
        cpu = "cpu" in (device, best_device().type)
        with refusals(InvalidInputError, f"WORLD_SIZE: found {count} in the environment"):
            self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.count, self.index = self._state.num_processes, self._state.process_index
        self.device = self._state.device
        atexit.register(_leave)
        if self.count != count:
            raise InvalidInputError(
                f"WORLD_SIZE: found {count} in the environment, but Accelerate sees "
                f"{self.count} processes; start them with accelerate launch or torchrun"
            )
        if device not in ("auto", self.device.type):
            raise InvalidInputError(
                f"device: found {device!r} for {self.count} processes, allowed are 'auto' and "
                f"{self.device.type!r}: each takes the one that it was launched for"
            )

    @property
    def main(self) -> bool:
        """Whether this is the process that reads the text and writes the results."""
        return self.index == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on the main process, on all of them.

        Raises:
            SofttraceError: on every process, if it failed on the main one: of the class that it
                has there, where softtrace raised it.
        """
        if self._state is None:
            return make()
        made, failure = self._attempt(make) if self.main else (None, None)
        sent: list[Any] = [made, told(failure)]
        broadcast_object_list(sent)
        if failure is not None:
            raise failure
        if sent[1] is not None:
            raise of_another(0, self.count, sent[1])
        return cast("T", sent[0])

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on this process, once it has ended well on all of them.

        Nobody waits for a process that failed.

        Raises:
            SofttraceError: on those that did not fail, if others did: what the first of these
                raised, of the class that it has there, where softtrace raised it.
        """
        if self._state is None:
            return work()
        made, failure = self._attempt(work)
        raise_everywhere(failure)
        return cast("T", made)

    @staticmethod
    def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        try:
            return work(), None
        except Exception as error:  # whatever it is: the others wait to hear of it
            return None, error


def _leave() -> None:
    """Destroy the process group, which would complain when the process ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
