"""A model that was proven to be the sum of its edges, and which models are."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from softtrace.anatomy.discovery import vocabulary_of
from softtrace.model.sharding import is_sharded
from softtrace.model.state import adapters_of, all_modules
from softtrace.tracing.later_hooks import forwards_of, hooks_of
from softtrace.tracing.runner import Runner
from softtrace.tracing.verification import Verification

ATTACHED: weakref.WeakKeyDictionary[nn.Module, Instrument] = weakref.WeakKeyDictionary()
"""Model to its instrument, which holds its parts; not of models whose parts refer to them."""

_OWN = "_softtrace_instrument"


class _Kept:
    """An instrument that its own model holds, where the model's parts refer to it, as units do.

    Held anywhere else they would keep it alive for ever. Copies of the model have none.
    """

    def __init__(self, instrument: Instrument | None = None) -> None:
        self.instrument = instrument

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@dataclass(frozen=True, eq=False, repr=False)
class Instrument(Runner):
    """A model that was proven to be the sum of its edges. Made by :func:`softtrace.attach`.

    Attributes:
        verification: What was proven, and how exactly.
        parts: Modules that it was proven with, all but the model itself.
        wrappers: Wrappers of PEFT around attention, each of which holds several copies of it.
        adapters: Adapters that the wrappers were set to.
        hooks: Numbers of the hooks that others had put on the parts by then, and of those that are
            known since to change nothing.
        forwards: That others had given to the parts by then; held weakly, they may refer to the
            model.
    """

    verification: Verification
    parts: tuple[nn.Module, ...]  # held, not numbered: ids of freed modules come back
    wrappers: tuple[nn.Module, ...]
    adapters: Hashable
    hooks: set[int]
    forwards: tuple[weakref.ref[Any], ...]

    @classmethod
    def of(cls, runner: Runner, verification: Verification) -> Instrument:
        """The instrument of a runner that was proven; from now on :func:`attached` finds it."""
        model = runner.model
        parts = _parts(model)
        wrappers = _wrappers(parts, [each.attention for each in runner.anatomy.layers])
        instrument = cls(
            **vars(runner),
            verification=verification,
            parts=parts,
            wrappers=wrappers,
            adapters=adapters_of(wrappers),
            hooks=hooks_of(parts),
            forwards=tuple(map(_weak, forwards_of(parts))),
        )
        _keep(model, instrument)
        return instrument

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the modules that were proven, and these their forwards.

        Where attention is one of ``modules_to_save``, the same adapter has to be active, and the
        vocabulary has to be the same, which ``resize_token_embeddings`` can change in place.
        """
        parts = _parts(model)
        same = len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))
        same = same and adapters_of(self.wrappers) == self.adapters
        same = same and forwards_of(parts) == [each() for each in self.forwards]
        return same and vocabulary_of(model) == self.anatomy.vocabulary

    def detach(self) -> None:
        """Forget the model. Between runs nothing of ours changes it, so nothing is left behind."""
        model = self.reference()
        if model is not None:
            ATTACHED.pop(model, None)
            vars(model).pop(_OWN, None)


def attached(model: nn.Module) -> Instrument | None:
    """The instrument that a model has; None where it has none, or was changed since."""
    known = ATTACHED.get(model)
    if known is None and (kept := vars(model).get(_OWN)) is not None:
        known = kept.instrument
    elif known is not None and is_sharded(model):  # since it was attached
        _keep(model, known)
    # A shallow copy of the model has what it has.
    own = known is not None and known.reference() is model and known.fits(model)
    return known if own else None


def _keep(model: nn.Module, instrument: Instrument) -> None:
    if is_sharded(model):
        ATTACHED.pop(model, None)
        vars(model)[_OWN] = _Kept(instrument)
    else:
        ATTACHED[model] = instrument


def _wrappers(parts: Sequence[nn.Module], attention: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """PEFT's wrappers (``modules_to_save``) around any of these modules."""
    inside = set(map(id, attention))
    return tuple(
        part
        for part in parts
        if "original_module" in part._modules and any(id(each) in inside for each in part.modules())
    )


def _weak(forward: Any) -> weakref.ref[Any]:
    """A method is the same when it is bound anew, as kernels do with every ``model.train()``."""
    bound = isinstance(forward, MethodType)
    return weakref.WeakMethod(forward) if bound else weakref.ref(forward)


def _parts(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(part for part in all_modules(model) if part is not model)
