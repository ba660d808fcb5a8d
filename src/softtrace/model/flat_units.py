"""Units of FSDP1 (``FullyShardedDataParallel``): wrappers whose weights are views of one tensor.

A unit gathers that tensor before its module's forward, and its weights are whole, with gradients,
from then to the end of that forward. With ``use_orig_params=True`` they are tensors of their own
also outside of it, but of the wrong shape: pieces of what this process keeps. The outermost unit
keeps what it gathered until the end of the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_AROUND = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_flat_unit(module: object) -> bool:
    """Whether a module is a unit of FSDP1."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def bare(module: nn.Module) -> nn.Module:
    """The module inside of FSDP1's wrapper and of torch's ``checkpoint_wrapper``, if any."""
    for name in _AROUND * 2:  # either may be around the other
        inside = module._modules.get(name)
        module = module if inside is None else inside
    return module.instead_of[0] if isinstance(module, _Instead) else module


def is_flattened(weight: Tensor) -> bool:
    """Whether this is a piece of a weight that a unit of FSDP1 keeps."""
    return bool(getattr(weight, "_fsdp_flattened", False))


def is_running(unit: Any) -> bool:
    """Whether the weights of a unit are whole at this moment, for its forward or because of us."""
    return bool(unit.training_state.name != "IDLE")


def is_outermost(unit: Any) -> bool:
    """Whether no other unit is around a unit; once asked, FSDP1 remembers what it saw."""
    return bool(unit.check_is_root())


@contextmanager
def whole_unit(unit: nn.Module) -> Iterator[None]:
    """Its own weights whole, for reading; not those of units inside of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
        yield


def through_unit(unit: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``call`` as a forward of the unit: gathered for it and for its backward pass, and reduced."""
    if is_running(unit):
        return call(*args, **kwargs)
    is_outermost(unit)  # it looks for units inside of it once, while they are there
    inside = unit._fsdp_wrapped_module
    unit._fsdp_wrapped_module = _Instead(call, inside)
    try:
        return unit(*args, **kwargs)
    finally:
        unit._fsdp_wrapped_module = inside


class _Instead(nn.Module):
    """Stands in for the module of a unit. A module that is called must not be a part of this."""

    def __init__(self, call: Callable[..., Any], inside: nn.Module) -> None:
        super().__init__()
        self.instead_of = [inside]  # in a list, so that it is no module of this one
        self.forward = lambda *args, **kwargs: call(*args, **kwargs)


def dtype_of_unit(unit: Any) -> torch.dtype | None:
    """The dtype in which a unit computes, if it is not that of its weights; None if it is."""
    dtype: torch.dtype | None = unit.mixed_precision.param_dtype
    return dtype
