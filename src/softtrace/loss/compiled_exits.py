"""Early exits read in a training forward that is compiled (``torch.compile``).

The compiler writes hooks into the graph that it makes, and does not look again whether they are
there. So hooks are put on the layers for good: they only note what enters a layer, which the graph
then gives besides, without a break. A graph that was made before they came, of this model or of
another one of its class, does not have them. The compiler does look whether a module has a
``forward`` of its own, so each gets the one of its class as its own, and a new graph is made.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import Anatomy
from softtrace.loss.early_exits import Seen
from softtrace.model.hooks import first_tensor


class _Noted:
    """What entered one module last, ``[B, T, d_model]``."""

    def __init__(self) -> None:
        self.stream: Tensor | None = None


class CompiledStreams:
    """The residual streams of the newest forward with gradients, of one model.

    Args:
        anatomy: of the model.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        norm = anatomy.readout.norm.module
        self._noted = [_noting(modules.layer) for modules in anatomy.layers] + [_noting(norm)]

    def clear(self) -> None:
        """Let go of what is held."""
        for noted in self._noted:
            noted.stream = None

    def take(self) -> Seen | None:
        """What was noted since :meth:`clear`; None where the forward had no hooks or gradients."""
        streams = [noted.stream for noted in self._noted if noted.stream is not None]
        self.clear()
        if len(streams) < len(self._noted) or not streams[-1].requires_grad:
            return None
        return Seen(streams[:-1], streams[-1], ended=True)


def _noting(module: nn.Module) -> _Noted:
    """Note what enters a module, for good."""
    noted, of_its_own = _Noted(), module._compiled_call_impl

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            noted.stream = first_tensor(args, kwargs)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        assert of_its_own is not None
        return of_its_own(*args, **kwargs)

    if of_its_own is None:
        put: Any = hook  # mypy takes hooks with keywords for others
        module.register_forward_pre_hook(put, with_kwargs=True)
        if "forward" not in vars(module):  # one that is there is another library's
            module.forward = MethodType(type(module).forward, module)
    else:  # a layer that is compiled by itself: in front of its graph, not in it
        module._compiled_call_impl = call
    return noted
