"""The state in which a model runs: train or eval mode, compiled or as written, checkpointed."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from softtrace.model.flat_units import bare

_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")  # of PEFT's layers


def all_modules(*models: nn.Module) -> list[nn.Module]:
    """What ``modules()`` of them gives, in another order and half the time: a step asks often."""
    found = {id(model): model for model in models}
    new = list(models)
    while new:
        for module in new.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                new.append(module)
    return list(found.values())


def adapters_of(modules: Iterable[nn.Module]) -> Hashable:
    """Which adapters of PEFT are switched on, merged and how scaled: a captured graph sees none."""
    return tuple(
        str([getattr(module, name) for name in _ADAPTERS] + [vars(module).get("scaling")])
        for module in modules
        if _ADAPTERS[0] in vars(module)
    )


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Eval mode for a run of ours: a recording and a masked run must be the same function.

    Each module's own train/eval flag is put back, not one flag for all.
    """
    training = [vars(module) for module in all_modules(model) if module.training]
    for flags in training:  # a module's own assignment looks for parameters first: 10 times slower
        flags["training"] = False
    try:
        yield
    finally:
        for flags in training:
            flags["training"] = True


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether any of them was compiled, in place or by a wrapper inside."""
    return any(
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own["_modules"]
        or ("forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"))
        for own in map(vars, modules)  # a module itself is asked much more slowly
    )


def checkpointing(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that torch's ``checkpoint_wrapper`` made, as Accelerate's and Lightning's FSDP use."""
    module: Any = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    if module is None:
        return []
    return [each for each in modules if isinstance(each, module.CheckpointWrapper)]


@contextmanager
def uncheckpointed(model: nn.Module) -> Iterator[None]:
    """Run the layers of ``checkpoint_wrapper`` as they are, for a run of ours.

    A layer that is run again in the backward pass would run without what is around our run.
    transformers' own checkpointing is off in eval mode.
    """
    wrappers = checkpointing(all_modules(model))
    before = [wrapper.checkpoint_fn for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.checkpoint_fn = operator.call
        yield
    finally:
        for wrapper, own in zip(wrappers, before, strict=True):
            wrapper.checkpoint_fn = own


def is_checkpointed(modules: Iterable[nn.Module]) -> bool:
    """Whether any of them is run again in the backward pass."""
    modules = list(modules)
    own = any(vars(each).get("gradient_checkpointing") for each in modules)
    return own or bool(checkpointing(modules))


def outside_of_checkpoint(layer: nn.Module, modules: Iterable[nn.Module]) -> nn.Module | None:
    """Whose hooks see what enters a layer, but not when the backward pass runs it again.

    Args:
        layer: of a model in which something is checkpointed.
        modules: all of that model.

    Returns:
        The wrapper that torch's ``checkpoint_wrapper`` made around the layer; the layer itself, if
        transformers checkpoints its ``forward``; None where neither is so (transformers
        before 5.23 checkpoints the call with its hooks).
    """
    for wrapper in checkpointing(modules):
        if wrapper is not layer and any(each is layer for each in wrapper.modules()):
            inside = bare(wrapper)
            return wrapper if layer in (inside, getattr(inside, "_orig_mod", None)) else None
    if "_orig_mod" in layer._modules:  # torch.compile's wrapper, around what checkpoints
        return layer
    own, kind = vars(layer).get("gradient_checkpointing", False), type(layer)
    of_forward = hasattr(kind.forward, "__wrapped__") and kind.__call__ is nn.Module.__call__
    return layer if own and of_forward else None


def is_reentrant(modules: Iterable[nn.Module]) -> bool:
    """Whether any of them is checkpointed in the reentrant way."""
    modules = list(modules)
    if any(each.checkpoint_impl.name == "REENTRANT" for each in checkpointing(modules)):
        return True
    return any(
        vars(module).get("gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get(
            "use_reentrant", True
        )
        for module in modules
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what was compiled in place (``model.compile()``) as it was written.

    Compiled code has no softmax to be seen, and hooks of ours would compile it anew.
    """
    if not is_compiled(all_modules(model)):  # importing the compiler takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """A run of ours: :func:`uncompiled`, :func:`uncheckpointed` and with :func:`dropout_off`."""
    with uncompiled(model), uncheckpointed(model), dropout_off(model):
        yield
