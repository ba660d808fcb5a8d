"""What a run hangs on modules while it runs: hooks that read an input or replace an output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def on_input(listen: Callable[[Tensor], None]) -> Callable[..., None]:
    """A forward pre-hook that lets ``listen(hidden_states)`` read a module's input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listen(args[0] if args else kwargs["hidden_states"])

    return hook


def on_output(change: Callable[[int, Tensor], Tensor], layer: int) -> Callable[..., Any]:
    """A forward hook that lets ``change(layer, output)`` replace a module's (first) output."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(layer, output[0]), *output[1:])
        return change(layer, output)

    return hook
