"""What a run hangs on modules while it runs: hooks that read an input or replace an output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Hook(NamedTuple):
    """A module, what to call, whether before its forward, and whether before all other hooks."""

    module: nn.Module
    call: Callable[..., Any]
    before: bool
    first: bool = False


def register(hooks: Iterable[Hook], handles: list[RemovableHandle]) -> None:
    """Register all; handles are added one by one, so that a failure leaves none unknown."""
    for module, call, before, first in hooks:
        put = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(put(call, prepend=first, with_kwargs=True))


def first_tensor(*places: Any) -> Tensor | None:
    """The first floating tensor among arguments, outputs, and tuples and mappings of them."""
    for place in places:
        if isinstance(place, Tensor):
            if place.is_floating_point():
                return place
        elif isinstance(place, Mapping):
            found = first_tensor(*place.values())
            if found is not None:
                return found
        elif isinstance(place, tuple | list):
            found = first_tensor(*place)
            if found is not None:
                return found
    return None


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    read = first_tensor(args, kwargs)
    if read is None:
        raise RuntimeError("a module that was proven to read a tensor was called without one")
    return read


def replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments with the first floating tensor replaced; None where ``change`` gives None."""
    for at, value in enumerate(args):
        if _is_floating(value):
            changed = change(value)
            return None if changed is None else ((*args[:at], changed, *args[at + 1 :]), kwargs)
    for name, value in kwargs.items():
        if _is_floating(value):
            changed = change(value)
            return None if changed is None else (args, {**kwargs, name: changed})
    return None


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def on_input(listen: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A forward pre-hook for a module's first floating input: ``listen(input)`` may replace it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first(args, kwargs, listen)

    return hook


def on_output(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook that lets ``change(input, output)`` replace a module's (first) output."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        read = _read(args, kwargs)
        if isinstance(output, tuple):
            return (change(read, output[0]), *output[1:])
        return change(read, output)

    return hook
