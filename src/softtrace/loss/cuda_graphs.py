"""Functions with their backward pass as CUDA graphs: captured once for a shape, then replayed.

What the term runs is thousands of small operations, and on a GPU what they cost is their launches.
Shapes are the same at every step, so a function and its backward pass are captured together and
later replayed by one call, on new values. Weights are read where they lie, so what an optimiser
writes there is seen.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softtrace.libraries import first_line
from softtrace.loss.fused import Run
from softtrace.loss.graph_memory import GraphMemory
from softtrace.loss.options import DensityOptions
from softtrace.model.state import adapters_of
from softtrace.tracing.instrument import Instrument

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MOST = 4  # graphs at a time, each of which holds gradients of its own
_SEEN = 2  # runs of a shape before it is captured; most shapes of ragged batches never come back
_WHEN = {
    "strength", "preset", "start_step", "warmup_steps", "every", "exit_every", "on_nonfinite",
    "seed", "budget", "reference", "monitor", "share", "crop",
}  # fmt: skip
_DIALS = [each.name for each in fields(DensityOptions) if each.name not in _WHEN]


class Captured:
    """One captured function and its backward pass.

    Args:
        run: gives some numbers, the first of which is differentiated, and then its gradients by
            what :meth:`replay` is called with, None where there is none. It reads ``inputs`` and
            the model's weights where they lie.
        inputs: that are written anew before every replay; the graph is of their device.
        numbers: how many there are; all that follows are gradients.
        model: to whose weights, those that are trained, the last of the gradients go.
        memory: that the function works in; the gradients lie outside of it.

    Raises:
        RuntimeError: the function does something that cannot be captured.
    """

    def __init__(
        self,
        run: Run,
        inputs: Sequence[Tensor],
        numbers: int,
        model: nn.Module,
        memory: GraphMemory,
    ) -> None:
        self._inputs = inputs
        self._weights = [each for each in model.parameters() if each.requires_grad]
        # A graph holds nothing of what it reads.
        self._held = run, [*model.parameters(), *model.buffers()]
        self.number = 0
        self._awaiting: weakref.ref[_Awaited] | None = None
        self._device = inputs[0].device
        with torch.cuda.device(self._device):
            self._graph, found = memory.capture(run)
        self._numbers = [each for each in found[:numbers] if each is not None]
        self.gradients = found[numbers:]

    @property
    def awaited(self) -> bool:
        """Whether a backward pass through the last replay may still come."""
        return self._awaiting is not None and self._awaiting() is not None

    def replay(self, values: Sequence[Tensor], by: Sequence[Tensor] = ()) -> list[Tensor]:
        """The numbers on these values; gradients come with the backward pass of the first.

        Args:
            values: of the inputs, in their order.
            by: what the first of the gradients go to, those that do not go to the weights.
        """
        for own, new in zip(self._inputs, values, strict=True):
            own.copy_(new.detach())
        with torch.cuda.device(self._device):
            self._graph.replay()
        self.number += 1
        # Copies: the next replay writes over what this one gave.
        first, *others = (each.clone() for each in self._numbers)
        pairs = [
            (leaf, gradient)
            for leaf, gradient in zip((*by, *self._weights), self.gradients, strict=True)
            if gradient is not None and leaf.requires_grad
        ]
        if pairs:  # weights without a gradient stay out, for who waits for all that take part
            leaves, gradients = zip(*pairs, strict=True)
            first = _Replayed.apply(self, gradients, first, *leaves)  # type: ignore[no-untyped-call]
        return [first, *others]

    def await_backward(self) -> _Awaited:
        """A token that lives as long as the autograd graph of this replay."""
        token = _Awaited()
        self._awaiting = weakref.ref(token)
        return token

    def ended(self) -> None:
        """The backward pass has read the gradients."""
        self._awaiting = None


class CudaGraphs:
    """Graphs of one kind of function, by what they depend on.

    Args:
        what: the function is called in a warning.
        instead: what that warning advises.

    Attributes:
        refused: whether a capture failed, after which none is tried.
        known: the graphs, by their keys.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.refused = False
        self.known: dict[Hashable, Captured] = {}
        self._seen: Counter[int] = Counter()  # by hashes: keys of a large model are large
        self._fuses = True
        self._said = what, instead

    def of(self, key: Hashable, capture: Callable[[bool], Captured], fuse: bool) -> Captured | None:
        """The graph of this key; None where there is none yet, or its last replay is awaited.

        Args:
            key: all that a graph depends on.
            capture: makes it, fused or not, once the key has come back often enough.
            fuse: whether to try that first.
        """
        known, seen = self.known.get(key), hash(key)
        new = known is None and self._seen[seen] >= _SEEN and len(self.known) < _MOST
        if new and not self.refused:
            if fuse and self._fuses:
                known = self._captured(capture, fuse=True)
                self._fuses = known is not None  # compiling takes long: no second try
            if known is None:
                known = self._captured(capture, fuse=False)
                self.refused = known is None
            if known is not None:
                self.known[key] = known
        self._seen[seen] += 1
        return None if known is None or known.awaited else known

    def _captured(self, capture: Callable[[bool], Captured], *, fuse: bool) -> Captured | None:
        what, instead = self._said
        try:
            return capture(fuse)
        except Exception as error:  # what is wrong with more than the capture is said by the run
            # Of the compiler's errors the first line names the compiler alone.
            cause = getattr(error, "inner_exception", error)
            reason = first_line(cause)
            if fuse:
                said = "cannot be compiled here and are captured as they are (fuse=False)."
            else:
                said = (
                    "cannot be captured as a CUDA graph here and are launched one operation at a "
                    f"time, which takes longer. {instead}"
                )
            logger.warning("%s %s What happened: %s: %s", what, said, type(cause).__name__, reason)
            return None


def capturable(values: Tensor, model: nn.Module) -> bool:
    """Whether this is CUDA with gradients, and not in float16, whose gradients vanish."""
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    half = half or next(model.parameters()).dtype == torch.float16
    return values.is_cuda and torch.is_grad_enabled() and not half


def key_of(instrument: Instrument, options: DensityOptions, *others: Hashable) -> Hashable:
    """What a graph depends on, beside the values that are copied into it.

    Args:
        instrument: of the model.
        options: of the term; those that decide when and how strongly it comes do not matter.
        others: shapes, say.
    """
    modules = instrument.model, *instrument.parts
    own = [vars(module) for module in modules]  # asking a module takes 10 times as long
    tensors = [its[kind] for its in own for kind in ("_parameters", "_buffers") if its[kind]]
    weights = tuple(
        (id(each), each.data_ptr(), each.requires_grad)
        for named in tensors
        for each in named.values()
        if each is not None
    )
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    dials = repr([getattr(options, name) for name in _DIALS])
    return id(instrument), weights, adapters_of(modules), autocast, dials, others


class _Within(nn.Module):
    """Has a model as its child, and calls a function that runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], run: Callable[[], T]) -> T:
    """What ``run`` gives while a model has other weights, and autocast remembers nothing.

    Args:
        model: any; its own weights are put back, tied ones are tied.
        weights: some of them, by the names of ``named_parameters``.
        run: runs the model.
    """
    new = {id(own): weights[name] for name, own in model.named_parameters() if name in weights}
    # Every place of a weight that is tied, but a module that has several places only once:
    # tie_weights=True would put back what it had written there itself.
    named = {
        f"model.{name}.{own}".replace("..", "."): new[id(each)]
        for name, module in model.named_modules()
        for own, each in module._parameters.items()
        if id(each) in new
    }
    device = next(iter(weights.values())).device.type
    # Autocast's cache holds casts of the weights as they were in another forward.
    with torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        cache_enabled=False,
    ):
        found: T = torch.func.functional_call(_Within(model), named, (run,), tie_weights=False)
    return found


def shared_weights(model: nn.Module, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Leaves that share the memory of a model's weights, by name; trained where those are.

    Gradients of the weights themselves would meet the graph of the training forward, which lives on
    another stream. Frozen weights of a class of their own (quantised ones) are left out: their
    layers ask for more than their values.

    Args:
        model: any.
        weights: its parameters, or what stands in for them, in their order.
    """
    return {
        name: each.detach().requires_grad_(own.requires_grad)
        for (name, own), each in zip(model.named_parameters(), weights, strict=True)
        if own.requires_grad or type(own) is nn.Parameter
    }


def zero_unless(
    finite: Tensor, number: Tensor, leaves: Iterable[Tensor], into: Iterable[Tensor | None]
) -> Tensor:
    """``number``, or 0 unless all was finite; so are its gradients, which are to be taken later.

    What is replayed is not looked at before its gradients are added. They become 0 one by one, as
    they come, and are written where they are to lie, so that no second copy of all of them is held.

    Args:
        finite: bool scalar.
        number: scalar.
        leaves: by which gradients will be taken.
        into: where each of them is to lie, None for memory of its own.
    """
    for leaf, own in zip(leaves, into, strict=True):
        leaf.register_hook(partial(written, finite, own))  # type: ignore[no-untyped-call]
    return torch.where(finite, number.detach(), 0.0)


def written(finite: Tensor, into: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A gradient, or 0 unless all was finite, in the memory of ``into`` where that is given."""
    if gradient is None:
        return None
    zero = gradient.new_zeros(())
    return torch.where(finite, gradient, zero, out=into)


class _Awaited:
    """Held by an autograd graph whose backward pass may still come."""


class _Replayed(torch.autograd.Function):
    """The first number of a replay, whose gradients were computed with it."""

    @staticmethod
    def forward(
        ctx: Any, captured: Captured, gradients: Sequence[Tensor], number: Tensor, *by: Tensor
    ) -> Tensor:
        ctx.captured, ctx.number, ctx.gradients = captured, captured.number, gradients
        ctx.token = captured.await_backward()
        return number.view_as(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: Captured = ctx.captured
        if captured.number != ctx.number:
            raise RuntimeError(
                "a second backward pass through a density term that was replayed or added up "
                "since; set cuda_graph=False"
            )
        captured.ended()
        nodes = [node for node, _ in ctx.next_functions[-len(ctx.gradients) :]]
        in_place: list[Tensor] = []
        copied: list[Tensor] = []
        for each, node in zip(ctx.gradients, nodes, strict=True):
            (in_place if _is_added(node) else copied).append(each)
        found = {id(each): each for each in in_place}
        if in_place:  # a copy of all would be held until the model's own gradients have come
            ctx.number = -1
            torch._foreach_mul_(in_place, gradient)
        if copied:
            scaled = torch._foreach_mul(copied, gradient)
            found.update(zip(map(id, copied), scaled, strict=True))
        return None, None, None, *(found[id(each)] for each in ctx.gradients)


def _is_added(node: Any) -> bool:
    """Whether what a backward pass gives to a node goes into a ``.grad``, which copies or adds it.

    What ``torch.autograd.grad`` gives is kept by who asked, so that the next replay must not write
    there; the engine does not say whether it will execute such a leaf, but raises.
    """
    if node is None or not node.name().endswith("AccumulateGrad"):
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False
