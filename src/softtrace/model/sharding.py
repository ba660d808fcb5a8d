"""Weights that FSDP and ZeRO 3 shard: whole only while the unit that holds them runs.

A unit gathers its weights before its own forward and lets go of them after it. Hooks of ours inside
of that forward find them whole. What is read or run outside of it has to have them gathered:
:func:`gathered` for reading, :func:`within_units` for running with gradients. All processes have to
come here together, as each of these waits for the others. Units are modules that ``fully_shard``
was called on (FSDP2), wrappers (FSDP1, :mod:`softtrace.model.flat_units`), or the model itself, in
which each module gathers its own (DeepSpeed's ZeRO 3, :mod:`softtrace.model.zero_units`).
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from softtrace.model.flat_units import (
    dtype_of_unit,
    is_flat_unit,
    is_flattened,
    is_running,
    through_unit,
    whole_unit,
)
from softtrace.model.state import all_modules
from softtrace.model.zero_units import (
    apart,
    beside_other_forwards,
    copied,
    gather,
    gathers_itself,
    is_let_go,
    is_zero_root,
    is_zero_weight,
    let_go_of,
)

_UNITS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Module to the unit that holds its own weights, of models that :func:`note_units` was given."""


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on the module."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(model: nn.Module) -> bool:
    """Whether a unit is anywhere in the model, or around it and known."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    zero = "deepspeed" in sys.modules
    if (fsdp is None and not zero) or not distributed.is_initialized():  # every step asks first
        return False
    units = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return unit_of(model) is not None or any(
        isinstance(each, units) or (zero and is_zero_root(each)) for each in all_modules(model)
    )


def note_units(model: nn.Module) -> None:
    """Remember which unit of the model holds whose weights; to be called before the others."""
    if not is_sharded(model):
        return
    seen: set[int] = set()

    def note(module: nn.Module, unit: nn.Module | None) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        own = is_unit(module) or is_flat_unit(module) or is_zero_root(module)
        unit = module if own else unit
        if unit is not None:
            _UNITS[module] = weakref.ref(unit)
        for child in module.children():
            note(child, unit)

    note(model, None)


def unit_of(module: nn.Module) -> nn.Module | None:
    """The unit that holds the module's own weights; None where they are whole at any time."""
    known = _UNITS.get(module)
    return None if known is None else known()


def is_part(weight: Tensor | None) -> bool:
    """Whether this is a weight of which each process has a part."""
    if weight is None:
        return False
    return _is_dtensor(weight) or is_flattened(weight) or is_zero_weight(weight)


def _is_dtensor(weight: Tensor | None) -> bool:
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(weight, tensor.DTensor)


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of a module itself, by name; FSDP1 makes them plain tensors while they are whole."""
    flat = is_flat_unit(unit_of(module))
    places = {**vars(module), **module._parameters} if flat else module._parameters
    return {name: each for name, each in places.items() if isinstance(each, Tensor)}


def as_it_was(unit: nn.Module) -> nn.Module:
    """A shallow copy of a unit, of the class that it had, without the hooks that gather it."""
    kind: Any = type(unit).__mro__[2]  # FSDP's own class for it comes first, then FSDPModule
    bare: nn.Module = kind.__new__(kind)
    vars(bare).update(vars(unit))
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    return bare


def is_in_parts(module: nn.Module) -> bool:
    """Whether weights of the module that its own unit holds are not gathered at this moment."""
    unit = unit_of(module)
    if is_flat_unit(unit):
        return not is_running(unit)
    if is_in_zero(module):
        return any(map(is_let_go, module.parameters()))
    own = (each for each in all_modules(module) if unit is not None and unit_of(each) is unit)
    return any(is_part(weight) for each in own for weight in each.parameters(recurse=False))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The module's weights whole, as far as its own unit holds them; let go again at exit.

    Nothing happens inside that unit's forward. What is read has to be used, or copied, inside.
    """
    if not is_in_parts(module):
        yield
        return
    unit: Any = unit_of(module)
    if is_flat_unit(unit):
        with whole_unit(unit):
            yield
        return
    weights = hold(module)
    try:
        yield
    finally:
        if is_in_zero(module):
            let_go_of(weights)
        else:
            unit.reshard()


def hold(module: nn.Module) -> list[Any]:
    """Gather the module's weights anew inside of :func:`gathered`, after a forward of its own.

    Returns:
        Weights of ZeRO 3 that this made whole.
    """
    unit: Any = unit_of(module)
    if is_in_zero(module):
        return gather(module, unit)
    if unit is not None:
        unit.unshard()
    return []


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Weights of some modules of ZeRO 3 whole for all that is inside, gathered once.

    How often they are read inside may then differ between processes. Others are left as they are.
    """
    with ExitStack() as stack:
        for module in modules:
            if is_in_zero(module):
                stack.enter_context(gathered(module))
        yield


def is_in_zero(module: nn.Module) -> bool:
    """Whether the module is in a model of ZeRO 3, whose root is known."""
    unit = unit_of(module)
    return unit is not None and is_zero_root(unit)


def run_alone(module: nn.Module, value: Tensor) -> Any:
    """What a module of ZeRO 3 gives, outside of the model's forward and of hooks on the module."""
    with gathered(module):
        return apart(module)(value)


def among_forwards(model: nn.Module) -> AbstractContextManager[None]:
    """A run of ours that may lie between another forward of the model and its backward pass."""
    return beside_other_forwards(model) if is_in_zero(model) else nullcontext()


def lasting(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of a module, whole now, as it stays also for a backward pass."""
    if unit_of(module) is None:
        return weight
    return copied(weight) if is_zero_weight(weight) else weight.clone()


def wraps_outputs(module: nn.Module) -> bool:
    """Whether a forward hook on the module has to see its output last.

    It lets go of its weights, and gathers them again for the backward pass of what it finds.
    """
    return is_unit(module) or gathers_itself(module)


def within_units(
    modules: Iterable[nn.Module], call: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """``call`` as a forward of the units that hold the weights of some modules.

    Gathered for it, and again for its backward pass, and with gradients that are reduced. A root
    that keeps what it gathered until the end of the backward pass is left as it is, if no other
    unit is run: with one, a backward pass of our own would end what the root keeps. What is whole
    where no gradients are taken is left too.

    Args:
        modules: whose forward (not ``__call__``) is run by ``call``.
        call: of one tensor to another.
    """
    units: dict[int, nn.Module] = {}
    roots: dict[int, nn.Module] = {}
    for module in modules:
        unit: Any = unit_of(module)
        if is_flat_unit(unit):
            units[id(unit)] = unit
        elif unit is None or is_zero_root(unit):  # whole, or each module gathers its own
            continue
        else:
            state = unit._get_fsdp_state()  # what was sharded together is one
            if is_in_parts(module) or (torch.is_grad_enabled() and not state._is_root):
                units[id(state)] = unit
            elif torch.is_grad_enabled():
                roots[id(state)] = unit
    for unit in (*units.values(), *(roots.values() if units else ())):  # the root is outermost
        call = partial(_through, unit, call)
    return call


def as_one_forward(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """``call`` as one forward of the unit around a model, if FSDP1 made one; else just called.

    A second backward pass through part of it can then come before the training's own, which FSDP1
    takes for the end of that where it meets the output of a unit.
    """
    unit = unit_of(model)
    found: Tensor = through_unit(unit, call) if is_flat_unit(unit) else call()
    return found


def run(model: nn.Module, **inputs: Any) -> Any:
    """What a model gives; inside of the unit around it that holds weights of it (PEFT's, FSDP1)."""
    unit = unit_of(model)
    if is_in_zero(model):  # each module gathers its own weights
        return model(**inputs)
    return model(**inputs) if unit in (None, model) else _through(unit, model, **inputs)


def _through(unit: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_flat_unit(unit):
        return through_unit(unit, call, *args, **kwargs)
    from torch.distributed.fsdp import register_fsdp_forward_method

    # Not the call itself: a module would become a part of the unit.
    unit.softtrace_call = lambda *args, **kwargs: call(*args, **kwargs)
    try:
        register_fsdp_forward_method(unit, "softtrace_call")
        return unit.softtrace_call(*args, **kwargs)
    finally:
        del unit.softtrace_call


def let_go(model: nn.Module) -> None:
    """Shard again what a root keeps whole after a forward, as weights may be loaded into it."""
    for module in all_modules(model):
        if is_unit(module):
            unit: Any = module
            unit.reshard()


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: of its weights, or of its units' mixed precision."""
    units: list[Any] = [each for each in all_modules(model) if is_unit(each)]
    dtypes = [unit._get_fsdp_state()._mp_policy.param_dtype for unit in units]
    around = {id(unit): unit for each in all_modules(model) if is_flat_unit(unit := unit_of(each))}
    dtypes += map(dtype_of_unit, around.values())
    stored = next(model.parameters()).dtype
    lowest: torch.dtype = min((stored, *filter(None, dtypes)), key=lambda each: each.itemsize)
    return lowest


def computing_device(parameter: Tensor) -> torch.device:
    """The device that a weight is used on: its unit may keep its part of it in main memory."""
    if not _is_dtensor(parameter):
        return parameter.device
    part: Any = parameter
    kind: str = part.device_mesh.device_type
    return torch.empty(0, device=kind).device


def reaching(value: Tensor, other: Tensor) -> Tensor:
    """``value``, whose backward pass also gives ``other`` a gradient, of 0."""
    found: Tensor = _Reaching.apply(value, other)  # type: ignore[no-untyped-call]
    return found


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.shape, ctx.like = other.shape, other.new_empty(0)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.like.new_zeros(()).expand(ctx.shape)
