"""What a run hangs on modules while it runs: hooks that read an input or replace an output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtrace.model.flat_units import is_flat_unit
from softtrace.model.sharding import wraps_outputs
from softtrace.model.state import all_modules
from softtrace.model.zero_units import gathers_itself

_ONLY_LOOK = ("transformers.", "softtrace.loss.compiled_exits")


class Hook(NamedTuple):
    """A module, what to call, whether before its forward, and whether before all other hooks."""

    module: nn.Module
    call: Callable[..., Any]
    before: bool
    first: bool = False


def register(hooks: Iterable[Hook], handles: list[RemovableHandle]) -> None:
    """Register all; handles are added one by one, so that a failure leaves none unknown.

    What is sharded is gathered for the backward pass by a hook on what its unit gives, which has to
    see what hooks of ours made of it: these come before, in their order. ZeRO 3 takes the gradient
    of a module's input for the end of its backward pass, so what reads it comes before that, too.
    """
    ahead: list[Hook] = []
    for hook in hooks:
        module, call, before, first = hook
        if gathers_itself(module) if before else wraps_outputs(module):
            ahead.insert(0 if first else len(ahead), hook)
            continue
        put = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(put(call, prepend=first, with_kwargs=True))
    for module, call, before, _ in reversed(ahead):
        put = module.register_forward_pre_hook if before else module.register_forward_hook
        handles.append(put(call, prepend=True, with_kwargs=True))


@contextmanager
def registered(hooks: Iterable[Hook]) -> Iterator[None]:
    """:func:`register` all, and remove them at exit."""
    handles: list[RemovableHandle] = []
    try:
        register(hooks, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def watched(model: nn.Module) -> bool:
    """Whether somebody hangs on the modules of a model who would miss the end of a forward.

    Sharding and offloading put weights away when a module has run. transformers' own hooks, on
    every model that was once asked for hidden states, only look, as those of a compiled model do.
    """
    modules = all_modules(model)
    hooks = (
        hook
        for module in modules
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_ONLY_LOOK) for hook in hooks
    ) or any("forward" in vars(module) or is_flat_unit(module) for module in modules)


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


def replace_first(place: Any, change: Callable[[Tensor], Tensor | None]) -> tuple[Any, bool]:
    """Replace the tensor that :func:`first_tensor` finds, wherever it is.

    Args:
        place: a tensor, or tuples, lists and mappings of anything.
        change: gives the new tensor, or None to leave it.

    Returns:
        ``place`` itself or a copy with the one tensor replaced, and whether it was found.
    """
    if isinstance(place, Tensor):
        if not place.is_floating_point():
            return place, False
        changed = change(place)
        return (place if changed is None else changed), True
    items: Any = ()
    if isinstance(place, Mapping):
        items = list(place.items())
    elif isinstance(place, tuple | list):
        items = list(enumerate(place))
    for key, value in items:
        changed, found = replace_first(value, change)
        if not found:
            continue
        if changed is value:
            return place, True
        if isinstance(place, Mapping):
            copied: Any = copy.copy(place)
            copied[key] = changed
            return copied, True
        parts = [*place[:key], changed, *place[key + 1 :]]
        named = hasattr(place, "_fields")
        return (type(place)(*parts) if named else type(place)(parts)), True
    return place, False


def on_input(listen: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A forward pre-hook for a module's first floating input: ``listen(input)`` may replace it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first((args, kwargs), listen)[0]

    return hook


def on_output(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook: ``change(input, output)`` replaces a module's first floating output."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        read = _read(args, kwargs)
        return replace_first(output, lambda value: change(read, value))[0]

    return hook
