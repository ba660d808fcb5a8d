"""Early exits read in a training forward that is compiled (``torch.compile``).

The compiler writes hooks into the graph that it makes, and does not look again whether they are
there. So hooks are put on the layers for good: they only note what enters a layer, which the graph
then gives besides, without a break. A graph that was made before they came, of this model or of
another one of its class, does not have them. The compiler does look whether a module has a
``forward`` of its own, so each gets the one of its class as its own, and a new graph is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import Anatomy
from softtrace.loss.early_exits import Seen, Watched
from softtrace.model.hooks import first_tensor
from softtrace.model.state import outside_of_checkpoint


class _Noted:
    """What entered one module last, ``[B, T, d_model]``, and whether it had a graph."""

    def __init__(self, module: nn.Module, *, with_graph: bool) -> None:
        self.module = weakref.ref(module)  # a copy of the model has the same hooks
        self.with_graph = with_graph
        self.asked = True  # whether there still is who reads it
        self.stream: Tensor | None = None
        self.had_graph = False


def noting_places(
    anatomy: Anatomy, depths: Iterable[int], checkpointed: Iterable[nn.Module] | None
) -> dict[int | None, nn.Module]:
    """Depth of an exit to the module that is entered there, in a forward and not in its backward.

    Args:
        anatomy: of the model.
        depths: of the exits, numbers of layers.
        checkpointed: modules of the model, if some of them run again in the backward pass.

    Returns:
        Layers, or what checkpoints them, and under None the last norm; nothing at all where a layer
        is checkpointed together with its hooks.
    """
    found: dict[int | None, nn.Module] = {None: anatomy.readout.norm.module}
    modules = None if checkpointed is None else list(checkpointed)
    for at in depths:
        layer = anatomy.layers[at].layer
        place = layer if modules is None else outside_of_checkpoint(layer, modules)
        if place is None:
            return {}
        found[at] = place
    return found


class CompiledStreams:
    """The residual streams of exits in the newest forward with gradients, of one model.

    Hooks stay where they were put, so each module gets its own once, whatever is read of it later.
    Once this is dropped they note nothing, and the next that looks at the model takes them over.

    Attributes:
        places: what the newest :meth:`note` asked for.
    """

    def __init__(self) -> None:
        self.places: dict[int | None, nn.Module] = {}
        self._every: dict[nn.Module, _Noted] = {}

    def __del__(self) -> None:
        self.clear()
        for noted in self._every.values():
            noted.asked = False

    def note(self, places: dict[int | None, nn.Module]) -> None:
        """Look at these modules from now on.

        Args:
            places: of :func:`noting_places`.
        """
        self.places = places
        for at, module in places.items():
            # The full prediction is held constant. What a compiled graph gives with gradients is
            # one more tensor of zeros in its backward pass where nothing comes back.
            here = _notes_on(module)
            noted = self._every.get(module) or next((each for each in here if not each.asked), None)
            if noted is None:
                noted = _Noted(module, with_graph=at is not None)
            noted.asked, self._every[module] = True, noted
            if noted not in here:  # new, or the module was compiled since
                _noting(module, noted)

    @contextmanager
    def watching(self, watched: Watched, say: Callable[[str], None]) -> Iterator[None]:
        """Add what the forward inside shows to ``watched``, or say why it showed nothing."""
        self.clear()
        yield
        if (seen := self.take()) is not None:
            watched.forwards.append(seen)
        else:
            say(
                "exits: nothing was noted in the compiled forward, so none is read early; it ran "
                "without gradients, or by a graph that was made before it was watched first. Run "
                "the first forward inside 'with density_loss.watching():', or call "
                "torch.compiler.reset() before it"
            )

    def clear(self) -> None:
        """Let go of what is held."""
        for noted in self._every.values():
            noted.stream = None

    def take(self) -> Seen | None:
        """What was noted since :meth:`clear`; None where the forward had no hooks or gradients."""
        noted = {at: self._every[module] for at, module in self.places.items()}
        had_graph = noted[None].had_graph
        found = {at: each.stream for at, each in noted.items() if each.stream is not None}
        self.clear()
        if len(found) < len(noted) or not had_graph:
            return None
        last = found.pop(None)
        return Seen({at: found[at] for at in found if at is not None}, last, ended=True)


def _notes_on(module: nn.Module) -> list[_Noted]:
    """What is noted of a module as it is now: by hooks, or in front of its own graph."""
    call: Any = module._compiled_call_impl
    puts: list[Any] = [] if call is not None else list(module._forward_pre_hooks.values())
    while hasattr(call, "around"):
        puts.append(call)
        call = call.around
    found = (getattr(put, "noted", None) for put in puts)
    return [each for each in found if isinstance(each, _Noted) and each.module() is module]


def _noting(module: nn.Module, noted: _Noted) -> None:
    """Note what enters a module, for good."""
    of_its_own = module._compiled_call_impl

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not noted.asked or not torch.is_grad_enabled():
            return
        if (stream := first_tensor(args, kwargs)) is not None:
            noted.had_graph = stream.requires_grad
            noted.stream = stream if noted.with_graph else stream.detach()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        assert of_its_own is not None
        return of_its_own(*args, **kwargs)

    put: Any = hook if of_its_own is None else call  # mypy takes hooks with keywords for others
    put.noted = noted
    if of_its_own is None:
        module.register_forward_pre_hook(put, with_kwargs=True)
        if "forward" not in vars(module):  # one that is there is another library's
            module.forward = MethodType(type(module).forward, module)
    else:  # a layer that is compiled by itself: in front of its graph, not in it
        put.around, module._compiled_call_impl = of_its_own, put
