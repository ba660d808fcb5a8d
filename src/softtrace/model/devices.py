"""Where a model's weights are: on one or several devices, or whole only in use.

``device_map`` and ``accelerate.cpu_offload`` wrap the forward of every module that has weights of
its own: they come to the execution device before it and go back to the ``meta`` device after it.
Hooks of ours stand outside of that forward, so what reads a weight there has to bring it first.
Where layers are on several devices a layer's own tensors stay on its own, and what is compared
across layers (importances, masks, residual streams that are kept) comes to that of the inputs.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils.modeling import align_module_device, get_max_memory
from torch import Tensor, nn

from softtrace.errors import InvalidInputError
from softtrace.libraries import first_line
from softtrace.model.flat_units import is_flat_unit, through_unit
from softtrace.model.sharding import (
    as_it_was,
    computing_device,
    gathered,
    is_in_zero,
    is_unit,
    lasting,
    own_weights,
    unit_of,
)
from softtrace.model.zero_units import gathers_itself


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's own weights whole and on its execution device, as in its own forward.

    Does nothing for a module that is neither offloaded nor sharded.
    """
    with gathered(module), align_module_device(module):
        yield


def run_by_itself(module: nn.Module, value: Tensor) -> Any:
    """What a module gives by itself, its weights as they are in the model's own forward."""
    unit = unit_of(module)
    if is_flat_unit(unit):  # its mixed precision is that of its forward alone
        return through_unit(unit, module, value)
    if is_in_zero(module):
        return module(value)
    with whole(module):
        return module(value)


def weight_of(module: nn.Module, name: str) -> Tensor | None:
    """A weight as the module's own forward has it; None where it has none of that name.

    It stays valid, also for a backward pass: sharding frees what it gathered.
    """
    with whole(module):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            return None
        return lasting(module, weight)


def unhooked(module: nn.Module) -> nn.Module:
    """A copy that shares the module's tensors and runs as it was written, without offloading.

    For runs with other weights than its own, which the offloading would put back.
    """
    bare = as_it_was(module) if is_unit(module) else copy.copy(module)
    weights: dict[str, Any] = own_weights(module)
    for name in ("forward", "_old_forward", "_hf_hook", *weights):
        vars(bare).pop(name, None)
    bare._parameters = {**dict(module._parameters.items()), **weights}
    if gathers_itself(module):
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
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


def arriving(module: nn.Module, value: Tensor) -> Tensor:
    """``value`` where the module's own forward takes it: Accelerate may move its inputs there."""
    return value.to(device_of_module(module)) if hasattr(module, "_hf_hook") else value


def execution_devices(model: nn.Module) -> set[torch.device]:
    """Where the modules of a model compute: one device, unless it is spread over several."""
    devices = {
        _device(hook.execution_device)
        for _, hook in offloads(model)
        if hook.execution_device is not None
    }
    stored = {computing_device(each) for each in model.parameters() if not each.is_meta}
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
    unit: Any = unit_of(module)
    if is_flat_unit(unit):  # which has no parameters while it runs
        device: torch.device = unit.compute_device
        return device
    first = computing_device(next(itertools.chain(module.parameters(), module.buffers())))
    if first.type != "meta":
        return first
    return next(iter(execution_devices(module)), first)


def _device(name: torch.device | int | str) -> torch.device:
    """A device that is there, as torch names it; Accelerate writes 0 for the first accelerator."""
    return torch.empty(0, device=name).device


def device_of(name: str) -> torch.device:
    """The device of that name, or the best one for "auto".

    Raises:
        InvalidInputError: this machine has no such device.
    """
    if name == "auto":
        return best_device()
    try:
        return _device(name)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device: found {name!r}, which this machine cannot use ({first_line(error)}); allowed "
            "are 'auto', 'cpu' and the accelerators that torch finds"
        ) from error


def check_device_map(
    device_map: str | None, max_memory: Mapping[str, str] | None, processes: int
) -> None:
    """Refuse what :func:`device_map_options` cannot give.

    Raises:
        InvalidInputError: another map than "auto", limits without a map, or several processes.
    """
    if device_map not in (None, "auto"):
        raise InvalidInputError(
            f"device_map: found {device_map!r}, allowed are None and 'auto'; what goes where is "
            "decided by max_memory"
        )
    if device_map is None and max_memory is not None:
        raise InvalidInputError("max_memory: found it without device_map; pass device_map 'auto'")
    if device_map is not None and processes > 1:
        raise InvalidInputError(
            f"device_map: found {device_map!r} with {processes} processes, each of which would "
            "offload the model to the same main memory; allowed is one process, without torchrun"
        )


def device_map_options(
    device_map: str | None,
    max_memory: Mapping[str, str] | None,
    device: torch.device,
    folder: str,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model larger than one device.

    Layers may be on several accelerators, and wait in main memory or on disk where those are full;
    what is compared across layers comes to the device of the embedding.

    Args:
        device_map: "auto", or None for no options.
        max_memory: device (a number, or "cpu") to what it may hold; None for what is free.
        device: that computes; on a CPU no accelerator does.
        folder: for weights that go to disk.

    Raises:
        InvalidInputError: a limit for an accelerator where the CPU computes.
    """
    if device_map is None:
        return {}
    limits = get_max_memory() if max_memory is None else max_memory
    others = sorted(key for key in map(str, limits) if key != "cpu")
    if device.type == "cpu" and others:
        if max_memory is not None:
            raise InvalidInputError(
                f"max_memory: found {', '.join(others)}, allowed is cpu, as the device is cpu"
            )
        others = []
    limits = {key if key == "cpu" else int(key): value for key, value in limits.items()
              if str(key) in ("cpu", *others)}  # fmt: skip
    return {"device_map": device_map, "max_memory": limits, "offload_folder": folder}
