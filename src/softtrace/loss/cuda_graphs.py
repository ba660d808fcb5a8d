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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softtrace.loss.fused import Tensors

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MOST = 4  # graphs at a time, each of which holds the memory of a run
_SEEN = 2  # runs of a shape before it is captured; most shapes of ragged batches never come back
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")  # of PEFT's layers


class Captured:
    """One captured function and its backward pass.

    Args:
        run: gives some numbers, the first of which is differentiated, and then its gradients by
            what :meth:`replay` is called with, None where there is none. It reads ``inputs`` and
            weights where they lie.
        inputs: that are written anew before every replay.
        numbers: how many there are; all that follows are gradients.
        weights: that the last of the gradients go to.

    Raises:
        RuntimeError: the function does something that cannot be captured.
    """

    def __init__(
        self,
        run: Callable[[], Tensors],
        inputs: Sequence[Tensor],
        numbers: int,
        weights: Iterable[Tensor],
    ) -> None:
        self._inputs = inputs
        self._weights = [each for each in weights if each.requires_grad]
        self._run = run  # holds what the graph reads beside its inputs
        self.number = 0
        self._awaiting: weakref.ref[_Awaited] | None = None
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need at their first call
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (of a DataLoader, say) may allocate meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            found = run()
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
        self._graph.replay()
        self.number += 1
        # Copies: the next replay writes over what this one gave.
        first, *others = (each.clone() for each in self._numbers)
        leaves = [*by, *self._weights]
        pairs = zip(leaves, self.gradients, strict=True)
        if any(each is not None and leaf.requires_grad for leaf, each in pairs):
            first = _Replayed.apply(self, first, *leaves)  # type: ignore[no-untyped-call]
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
    """

    def __init__(self, what: str, instead: str) -> None:
        self.refused = False
        self.known: dict[Hashable, Captured] = {}
        self._seen: Counter[Hashable] = Counter()
        self._said = what, instead

    def of(self, key: Hashable, capture: Callable[[bool], Captured], fuse: bool) -> Captured | None:
        """The graph of this key; None where there is none yet, or its last replay is awaited.

        Args:
            key: all that a graph depends on.
            capture: makes it, fused or not, once the key has come back often enough.
            fuse: whether to try that first.
        """
        new = key not in self.known and self._seen[key] >= _SEEN and len(self.known) < _MOST
        tried = new and not self.refused
        if tried and not (fuse and self._captures(key, capture, fuse=True)):
            self.refused = not self._captures(key, capture, fuse=False)
        self._seen[key] += 1
        found = self.known.get(key)
        return None if found is None or found.awaited else found

    def _captures(self, key: Hashable, capture: Callable[[bool], Captured], *, fuse: bool) -> bool:
        what, instead = self._said
        try:
            # A capture that fails does not give the stream back that it switched to.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self.known[key] = capture(fuse)
        except Exception as error:  # what is wrong with more than the capture is said by the run
            _end_capture_of_random_numbers()
            reason = str(error).strip().partition("\n")[0]
            if fuse:
                said = "cannot be compiled here and are captured as they are (fuse=False)."
            else:
                said = (
                    "cannot be captured as a CUDA graph here and are launched one operation at a "
                    f"time, which takes longer. {instead}"
                )
            logger.warning("%s %s What happened: %s", what, said, reason)
            return False
        return True


def capturable(values: Tensor) -> bool:
    """Whether this is CUDA with gradients, and not in float16, whose gradients vanish."""
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    return values.is_cuda and torch.is_grad_enabled() and not half


def state_of(modules: Sequence[nn.Module]) -> Hashable:
    """What a graph of a model's weights depends on, beside the values that are copied into it.

    Args:
        modules: all of the model.
    """
    own = [vars(module) for module in modules]  # asking a module takes 10 times as long
    weights = tuple(
        (each.data_ptr(), each.requires_grad)
        for names in own
        for each in names["_parameters"].values()
        if each is not None
    )
    adapters = tuple(
        str([getattr(module, name) for name in _ADAPTERS])
        for module, names in zip(modules, own, strict=True)
        if _ADAPTERS[0] in names
    )
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return weights, adapters, autocast


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
    named = {f"model.{name}": each for name, each in weights.items()}
    device = next(iter(weights.values())).device.type
    # Autocast's cache holds casts of the weights as they were in another forward.
    with torch.autocast(
        device,
        enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
        cache_enabled=False,
    ):
        found: T = torch.func.functional_call(_Within(model), named, (run,))
    return found


def shared_weights(model: nn.Module, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Leaves that share the memory of a model's weights, by name; trained where those are.

    Gradients of the weights themselves would meet the graph of the training forward, which lives on
    another stream.

    Args:
        model: any.
        weights: its parameters, or what stands in for them, in their order.
    """
    named = zip(model.named_parameters(), weights, strict=True)
    return {name: each.detach().requires_grad_(own.requires_grad) for (name, own), each in named}


def _end_capture_of_random_numbers() -> None:
    """A capture that failed leaves the generator waiting for its end, and refuses every draw."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class _Awaited:
    """Held by an autograd graph whose backward pass may still come."""


class _Replayed(torch.autograd.Function):
    """The first number of a replay, whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, number: Tensor, *by: Tensor) -> Tensor:
        ctx.captured, ctx.number = captured, captured.number
        ctx.token = captured.await_backward()
        return number.view_as(number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: Captured = ctx.captured
        if captured.number != ctx.number:
            raise RuntimeError(
                "a second backward pass through a density term whose masked runs were replayed "
                "since; set cuda_graph=False"
            )
        captured.ended()
        there = [each for each in captured.gradients if each is not None]
        scaled = iter(torch._foreach_mul(there, gradient))
        return None, None, *(None if each is None else next(scaled) for each in captured.gradients)
