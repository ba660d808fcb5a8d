"""Hooks that were put on a model after it was proven: which they are, and a run without them.

And forwards that were put in the place of those of its modules.

Hooks are known by their numbers, which torch counts up and gives to no second hook: held
themselves, they would keep alive what they refer to, as the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from softtrace.model.state import all_modules

Hooks = Mapping[int, Callable[..., Any]]
_KINDS = ("_forward_hooks", "_forward_pre_hooks")
#: ours are there in our own runs alone, or only look, as those of transformers do
_OTHERS = ("softtrace.", "transformers.")


def hooks_of(modules: Iterable[nn.Module]) -> set[int]:
    """Numbers of the hooks that others put on these modules."""
    found: set[int] = set()
    for module in modules:
        if not module._forward_hooks and not module._forward_pre_hooks:  # a step asks often
            continue
        for hooks in _hooks(module):
            found.update(
                number for number, hook in hooks.items() if not _module_of(hook).startswith(_OTHERS)
            )
    return found


def forwards_of(modules: Iterable[nn.Module]) -> list[Callable[..., Any]]:
    """Forwards that others gave to these modules in place of those of their classes."""
    given = ((module, vars(module)["forward"]) for module in modules if "forward" in vars(module))
    return [
        forward
        for module, forward in given
        if getattr(forward, "__func__", None) is not type(module).forward
        and not _module_of(forward).startswith(_OTHERS[0])
    ]


def hooked(model: nn.Module, numbers: Collection[int]) -> list[str]:
    """Names of the modules that these hooks are on."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if any(number in hooks for hooks in _hooks(module) for number in numbers)
    ]


@contextmanager
def without_hooks(model: nn.Module, numbers: Collection[int]) -> Iterator[None]:
    """Take hooks away, and put them back where they were among the others."""
    places = [
        (module, kind, hooks)
        for module in all_modules(model)
        for kind, hooks in zip(_KINDS, _hooks(module), strict=True)
        if hooks
    ]
    try:
        for module, kind, hooks in places:
            left = ((number, hook) for number, hook in hooks.items() if number not in numbers)
            vars(module)[kind] = OrderedDict(left)
        yield
    finally:
        for module, kind, hooks in places:
            vars(module)[kind] = hooks


def _hooks(module: nn.Module) -> tuple[Hooks, Hooks]:
    return module._forward_hooks, module._forward_pre_hooks


def _module_of(hook: Any) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))  # of a partial's function
