"""Where a model's weights are: on one device, or offloaded by Accelerate and whole only in use.

``device_map`` and ``accelerate.cpu_offload`` wrap the forward of every module that has weights of
its own: they come to the execution device before it and go back to the ``meta`` device after it.
Hooks of ours stand outside of that forward, so what reads a weight there has to bring it first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.modeling import align_module_device
from torch import nn


def whole(module: nn.Module) -> AbstractContextManager[None]:
    """The module's own weights on its execution device, as in its own forward.

    A tensor that was read inside stays valid after it. Does nothing for a module that is not
    offloaded.
    """
    context: AbstractContextManager[None] = align_module_device(module)
    return context


def unhooked(module: nn.Module) -> nn.Module:
    """A copy that shares the module's tensors and runs as it was written, without offloading.

    For runs with other weights than its own, which the offloading would put back.
    """
    bare = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(bare).pop(name, None)
    bare._parameters = dict(module._parameters)
    bare._buffers = dict(module._buffers)
    return bare


def offloads(model: nn.Module) -> Iterator[tuple[str, AlignDevicesHook]]:
    """Names of modules whose weights Accelerate places, and what places them."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
        for each in hooks:
            if isinstance(each, AlignDevicesHook):
                yield name, each


def unplaced(model: nn.Module) -> list[str]:
    """Names of modules with weights on the meta device that nothing brings when they run."""
    placed = {name for name, hook in offloads(model) if hook.offload}
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if name not in placed and any(each.is_meta for each in module.parameters(recurse=False))
    ]


def execution_devices(model: nn.Module) -> set[torch.device]:
    """Where the modules of a model compute: one device, unless it is spread over several."""
    devices = {
        _device(hook.execution_device)
        for _, hook in offloads(model)
        if hook.execution_device is not None
    }
    stored = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    # A weight that is offloaded is stored elsewhere than it is used; others are used in place.
    return devices | stored


def best_device() -> torch.device:
    """The accelerator that torch finds, without number, else the CPU.

    Apple's is passed over: curves are read in float64, which it lacks.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else found


def device_of_module(module: nn.Module) -> torch.device:
    """The device that inputs of a model, or of a module of it, have to be on."""
    first = next(itertools.chain(module.parameters(), module.buffers())).device
    if first.type != "meta":
        return first
    return next(iter(execution_devices(module)), first)


def _device(name: torch.device | int | str) -> torch.device:
    """As torch names it: Accelerate writes 0 for the first accelerator."""
    return torch.empty(0, device=name).device
