"""Runs of a model in parts by processes with tokens of their own: whichever run one wants, all run.

A unit of FSDP gathers its weights from all processes, so that no process can run the model alone.
But one may have more batches than another, or have to halve them. So before each run they tell one
another which kind of run they want next, and those that want another, or none any more, run that
kind on tokens that stand in for their own. Norm and head are held whole meanwhile: reading logits
is then no matter of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

import torch
from torch import distributed, nn

from softtrace.errors import InvalidInputError, NonFiniteError
from softtrace.model.flat_units import is_flat_unit
from softtrace.model.memory import ran_out
from softtrace.model.sharding import gathered, hold, is_sharded, unit_of
from softtrace.processes import raise_everywhere

Kind = Literal["recording", "masked"]
"""Kinds of runs; all runs of a kind gather the same weights in the same order."""

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, _Turns] = weakref.WeakKeyDictionary()
"""Model to the turns that its runs take."""


@contextmanager
def in_turns(
    model: nn.Module,
    readout: Sequence[nn.Module],
    stand_ins: Mapping[Kind, Callable[[], object]],
) -> Iterator[None]:
    """Let each process that holds parts of a model run it as often as it needs to.

    All of them have to come here. Of a model that is whole, and inside of another ``in_turns``,
    nothing happens.

    Args:
        model: whose runs are those of :func:`turn_of`.
        readout: its final norm and head.
        stand_ins: run it, by kind, on tokens that nobody looks at.

    Raises:
        Exception: what was raised inside.
        SofttraceError: on the other processes, once they have ended: see
            :func:`softtrace.processes.raise_everywhere`. What is raised in the middle of a run is
            not told: others wait for weights there, until the process that failed ends (gloo: they
            get ``RuntimeError: Connection closed by peer`` then) or the group's timeout. So do not
            catch it. With gloo of torch 2.13 nothing short of that reaches them: ``abort``,
            ``shutdown`` and ``destroy_process_group`` were tried in the process that failed, and,
            told through the store, in a thread of one that waits.
    """
    if not is_sharded(model) or model in _ACTIVE:
        yield
        return
    failure: Exception | None = None
    turns = _Turns(readout, stand_ins)
    with turns.readout_whole():
        _ACTIVE[model] = turns
        try:
            try:
                yield
            except Exception as error:
                if turns.broken:
                    raise
                failure = error
            turns.wait_for(None)
        finally:
            del _ACTIVE[model]
    raise_everywhere(failure)


@contextmanager
def turn_of(model: nn.Module, kind: Kind) -> Iterator[None]:
    """One run of a model, inside of :func:`in_turns` when it is its turn; elsewhere at once.

    Raises:
        InvalidInputError: memory ran out in the middle of a run that others take part in.
    """
    turns = _ACTIVE.get(model)
    if turns is None:
        yield
        return
    with turns.turn(kind):
        yield


class _Turns:
    def __init__(
        self, readout: Sequence[nn.Module], stand_ins: Mapping[Kind, Callable[[], object]]
    ) -> None:
        # The outermost unit of FSDP1, in which they are, stays gathered after a run.
        self._readout = [each for each in readout if not is_flat_unit(unit_of(each))]
        self._stand_ins = stand_ins
        self._standing_in = False
        self.broken = False  # whether a run ended in its middle, where others wait for weights

    @contextmanager
    def readout_whole(self) -> Iterator[None]:
        """Norm and head whole, also between the runs of :meth:`turn`."""
        with ExitStack() as stack:
            for each in self._readout:
                stack.enter_context(gathered(each))
            yield

    @contextmanager
    def turn(self, kind: Kind) -> Iterator[None]:
        if not self._standing_in:
            self.wait_for(kind)
        try:
            yield
        except Exception as error:
            self.broken = True
            if not ran_out(error):
                raise
            raise InvalidInputError(
                "memory ran out in a run of a model whose weights are sharded: all processes take "
                "part in it, so this one cannot try less by itself. Take fewer or shorter "
                "sequences at a time (batch_size)"
            ) from error
        for each in self._readout:  # its unit let go of it
            hold(each)

    def wait_for(self, kind: Kind | None) -> None:
        """Run what other processes want until it is the turn of what this one wants.

        Args:
            kind: None where it wants no run any more: it returns when nobody does.
        """
        while True:
            wanted: list[Kind | None] = [None] * distributed.get_world_size()
            distributed.all_gather_object(wanted, kind)
            turn = next((each for each in self._stand_ins if each in wanted), None)
            if turn is None or turn == kind:
                return
            self._standing_in = True
            try:
                with torch.no_grad(), suppress(NonFiniteError):  # of its own tokens others raise it
                    self._stand_ins[turn]()
            finally:
                self._standing_in = False
