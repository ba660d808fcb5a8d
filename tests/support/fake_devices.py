"""Devices that this machine does not have: tensors that say where they are, and compute on the CPU.

``lazy:0`` and ``lazy:1`` are names that torch knows and nothing else uses. As on real devices,
tensors of two of them do not meet in one operation, unless one is a single number of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_KIND = "lazy"
_TORCHS, _ASKED, _MODULES = torch.autocast, torch.is_autocast_enabled, torch.get_device_module
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor whose numbers are ``held`` on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Elsewhere:
        made: Any = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=device, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        found: Elsewhere = made
        return found

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device of its arguments or where it is asked for."""
    leaves, shape = tree_flatten((args, kwargs))
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    devices = {each.device for each in tensors if each.dim() or each.device.type != "cpu"}
    if len(devices) > 1 and func not in _MOVES:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {devices}")
    device = next(iter(devices), torch.device("cpu"))
    asked = kwargs.get("device")
    if asked is not None:
        device = torch.device(asked)
    elif func in _MOVES and tensors:
        device = tensors[0].device
    if device.type == _KIND and device.index is None:
        device = torch.device(_KIND, 0)
    held = [each.held if isinstance(each, Elsewhere) else each for each in leaves]
    plain, named = tree_unflatten(held, shape)
    if asked is not None:
        named = {**named, "device": torch.device("cpu")}
        named.pop("pin_memory", None)
    found = func(*plain, **named)
    known = {
        id(mine): each for mine, each in zip(held, leaves, strict=True) if isinstance(each, Tensor)
    }

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:  # it was changed in place
            return known[id(value)]
        return Elsewhere(value, device) if device.type == _KIND else value

    return tree_map(placed, found)


class _Factories(TorchDispatchMode):
    """New tensors, and copies of the CPU's, on devices that are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _autocast(device_type: str, **options: Any) -> Any:
    """torch's; none where it has none."""
    return nullcontext() if device_type == _KIND else _TORCHS(device_type, **options)


def _asked(*device_type: str) -> bool:
    return _KIND not in device_type and _ASKED(*device_type)


def _module(device: Any = None) -> Any:
    return None if _KIND in str(device) else _MODULES(device)


@contextmanager
def fake_devices() -> Iterator[tuple[str, str]]:
    """Two devices, for as long as this lasts."""
    set_: Any = torch._C._set_only_lift_cpu_tensors
    before = torch._C._only_lift_cpu_tensors()
    set_(True)  # torch.tensor makes numbers on the CPU, and moves them
    try:
        with (
            _Factories(),
            patch.object(torch, "autocast", _autocast),
            patch.object(torch, "is_autocast_enabled", _asked),
            patch.object(torch, "get_device_module", _module),
        ):
            yield f"{_KIND}:0", f"{_KIND}:1"
    finally:
        set_(before)


def on_cpu(value: Tensor) -> Tensor:
    """The numbers of a tensor, wherever it says that it is."""
    return value.detach().held if isinstance(value, Elsewhere) else value


def spread(model: Any, first: str, second: str) -> Any:
    """The first layer beside the embedding; the others, the final norm and the head elsewhere."""
    layers = {
        f"model.layers.{at}": second if at else first for at in range(len(model.model.layers))
    }
    ends = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second}
    return dispatch_model(model, {**ends, **layers, "lm_head": second}, main_device=first)
