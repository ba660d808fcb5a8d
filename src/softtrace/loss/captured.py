"""Masked runs as one CUDA graph: captured once for a shape, then replayed.

A masked run is thousands of small operations, and on a GPU what they cost is their launches. The
windows that a step looks at have the same shape at every step, so recording run, masked run and
their backward pass are captured together and later replayed by one call, on new windows. Weights
are read where they lie, so what an optimiser writes there is seen.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softtrace.loss.fused import Tensors, fused
from softtrace.loss.masked_term import MaskedTerm, masked_term
from softtrace.loss.options import DensityOptions
from softtrace.loss.windows import Windows
from softtrace.model.state import all_modules, dropout_off, uncompiled
from softtrace.tracing.instrument import Instrument

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MOST = 4  # graphs at a time, each of which holds the memory of a masked run
_SEEN = 2  # runs of a shape before it is captured; most shapes of ragged batches never come back
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")  # of PEFT's layers


class CapturedTerms:
    """Runs masked runs, captured where they can be; of one model at a time."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: Counter[Hashable] = Counter()
        self._refused = False

    def __call__(
        self, instrument: Instrument, windows: Windows, options: DensityOptions
    ) -> MaskedTerm | None:
        """See :func:`softtrace.loss.masked_term.masked_term`.

        Raises:
            NonFiniteError: logits are not finite.
        """
        if not options.cuda_graph or self._refused or not _capturable(windows):
            return masked_term(instrument, windows, options)
        key = _key(instrument.model, windows, options)
        known = self._graphs.get(key)
        if known is None and self._seen[key] >= _SEEN and len(self._graphs) < _MOST:
            known = self._capture(key, instrument, windows, options)
        self._seen[key] += 1
        if known is not None and not known.awaited:
            found: MaskedTerm | None = known.replay(windows)
        elif self._refused:
            return masked_term(instrument, windows, options)
        else:
            # As it is captured, so that a resumed run, which captures anew, computes the same.
            found = masked_term(instrument, windows, options, static=True)
        if found is not None:
            found.check()
        return found

    def _capture(
        self, key: Hashable, instrument: Instrument, windows: Windows, options: DensityOptions
    ) -> _Captured | None:
        try:
            # A capture that fails does not give the stream back that it switched to.
            with torch.cuda.stream(torch.cuda.current_stream()):
                self._graphs[key] = _Captured(instrument, windows, options)
        except Exception as error:  # what is wrong with more than the capture is said by the run
            self._refused = True
            _end_capture_of_random_numbers()
            reason = str(error).strip().partition("\n")[0]
            logger.warning(
                "the masked runs cannot be captured as a CUDA graph here and are launched one "
                "operation at a time, which takes longer. With cuda_graph=False they come as "
                "seldom as suits that (every=8, share=0.3). What happened: %s",
                reason,
            )
        return self._graphs.get(key)


def _capturable(windows: Windows) -> bool:
    """Whether this step runs on CUDA with gradients, and not in float16, whose gradients vanish."""
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    return windows.batch.input_ids.is_cuda and torch.is_grad_enabled() and not half


def _key(model: nn.Module, windows: Windows, options: DensityOptions) -> Hashable:
    """What a graph depends on, beside the values that are copied into it."""
    batch = windows.batch
    weights = tuple((each.data_ptr(), each.requires_grad) for each in model.parameters())
    adapters = tuple(
        str([getattr(each, name) for name in _ADAPTERS])
        for each in all_modules(model)
        if hasattr(each, _ADAPTERS[0])
    )
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    shape = tuple(batch.input_ids.shape), batch.positions is None, batch.packed
    return shape, weights, adapters, autocast, repr(options)


class _Captured:
    """One captured run of masked runs and their backward pass.

    Args:
        instrument: of the model.
        windows: of the shape to capture.
        options: of the term.

    Raises:
        RuntimeError: the model does something that cannot be captured.
    """

    def __init__(self, instrument: Instrument, windows: Windows, options: DensityOptions) -> None:
        self._windows = _copy(windows)
        self.weights = [each for each in instrument.model.parameters() if each.requires_grad]
        self.number = 0
        self._awaiting: weakref.ref[_Awaited] | None = None
        run = term_and_gradients(instrument, self._windows, options)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate what they need at their first call
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (of a DataLoader, say) may allocate meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            found = run()
        term = len(found) - len(self.weights)
        self.found: list[Tensor] = [each for each in found[:term] if each is not None]
        self.gradients = found[term:]

    @property
    def awaited(self) -> bool:
        """Whether a backward pass through the last replay may still come."""
        return self._awaiting is not None and self._awaiting() is not None

    def replay(self, windows: Windows) -> MaskedTerm:
        """Run on windows of the same shape; gradients come with the backward pass of the term."""
        for own, new in zip(_tensors(self._windows), _tensors(windows), strict=True):
            own.copy_(new)
        self._graph.replay()
        self.number += 1
        # Copies: the next replay writes over what this one gave.
        term, *others = (each.clone() for each in self.found)
        if any(each is not None for each in self.gradients):
            term = _Replayed.apply(self, term, *self.weights)  # type: ignore[no-untyped-call]
        return MaskedTerm(term, *others)

    def await_backward(self) -> _Awaited:
        """A token that lives as long as the autograd graph of this replay."""
        token = _Awaited()
        self._awaiting = weakref.ref(token)
        return token

    def ended(self) -> None:
        """The backward pass has read the gradients."""
        self._awaiting = None


def term_and_gradients(
    instrument: Instrument,
    windows: Windows,
    options: DensityOptions,
    backend: str = "inductor",
) -> Callable[[], Tensors]:
    """A static run of these windows and its backward pass, to be called again and again.

    It reads the model's weights and the windows where they lie, and gives the scalars of
    :class:`MaskedTerm` and then a gradient for every weight that is trained, None where none is.

    Args:
        instrument: of the model.
        windows: whose values may change between calls.
        options: of the term.
        backend: of ``torch.compile``, with ``options.fuse``.
    """
    weights = dict(instrument.model.named_parameters())
    tensors = _tensors(windows)
    device = windows.batch.input_ids.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(given: Sequence[Tensor]) -> Tensors:
        # Gradients of the weights themselves would meet the graph of the training forward, which
        # lives on another stream. These share their memory.
        shared = {
            name: each.detach().requires_grad_(weights[name].requires_grad)
            for name, each in zip(weights, given, strict=False)
        }
        own = _with_tensors(windows, given[len(weights) :])
        # Without autocast's cache: it holds casts of the weights as they were in another forward.
        with torch.autocast(device, enabled=enabled, dtype=dtype, cache_enabled=False):
            found = with_weights(
                instrument.model,
                shared,
                lambda: masked_term(instrument, own, options, static=True),
            )
        assert found is not None
        trained = [each for each in shared.values() if each.requires_grad]
        gradients: Tensors = [None] * len(trained)
        if found.term.requires_grad:
            gradients = torch.autograd.grad(found.term, trained, allow_unused=True)
        scalars = [each.detach() for each in found if each is not None]
        return [*scalars, *gradients]

    inputs = [*(each.detach() for each in weights.values()), *tensors]
    if not options.fuse:
        return lambda: run(inputs)
    with dropout_off(instrument.model), uncompiled(instrument.model):
        return fused(run, inputs, backend)


class _Within(nn.Module):
    """Has a model as its child, and calls a function that runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], run: Callable[[], T]) -> T:
    """What ``run`` gives while a model has other weights.

    Args:
        model: any; its own weights are put back, tied ones are tied.
        weights: some of them, by the names of ``named_parameters``.
        run: runs the model.
    """
    named = {f"model.{name}": each for name, each in weights.items()}
    found: T = torch.func.functional_call(_Within(model), named, (run,))
    return found


def _end_capture_of_random_numbers() -> None:
    """A capture that failed leaves the generator waiting for its end, and refuses every draw."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class _Awaited:
    """Held by an autograd graph whose backward pass may still come."""


class _Replayed(torch.autograd.Function):
    """The term of a replay, whose gradients were computed with it."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, term: Tensor, *weights: Tensor) -> Tensor:
        ctx.captured, ctx.number = captured, captured.number
        ctx.token = captured.await_backward()
        return term.view_as(term)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        captured: _Captured = ctx.captured
        if captured.number != ctx.number:
            raise RuntimeError(
                "a second backward pass through a density term whose masked runs were replayed "
                "since; set cuda_graph=False"
            )
        captured.ended()
        there = [each for each in captured.gradients if each is not None]
        scaled = iter(torch._foreach_mul(there, gradient))
        return None, None, *(None if each is None else next(scaled) for each in captured.gradients)


def _copy(windows: Windows) -> Windows:
    return Windows(
        windows.batch.part(torch.clone), windows.thresholds.clone(), windows.depths.clone()
    )


def _with_tensors(windows: Windows, tensors: Sequence[Tensor]) -> Windows:
    """The windows with other tensors of the same shapes, in the order of :func:`_tensors`."""
    ids, valid, targets, counted, *positions, thresholds, depths = tensors
    batch = replace(
        windows.batch,
        input_ids=ids,
        valid=valid,
        targets=targets,
        counted=counted,
        positions=positions[0] if positions else None,
    )
    return Windows(batch, thresholds, depths)


def _tensors(windows: Windows) -> list[Tensor]:
    batch = windows.batch
    own = [batch.input_ids, batch.valid, batch.targets, batch.counted]
    more = [] if batch.positions is None else [batch.positions]
    return [*own, *more, windows.thresholds, windows.depths]
