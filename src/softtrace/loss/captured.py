"""Masked runs as one CUDA graph: recording run, masked run and their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from softtrace.loss.cuda_graphs import (
    Captured,
    CudaGraphs,
    capturable,
    key_of,
    shared_weights,
    with_weights,
    zero_unless,
)
from softtrace.loss.fused import Run, Tensors, fused
from softtrace.loss.graph_memory import GraphMemory
from softtrace.loss.masked_term import MASKED_LOGITS, MaskedTerm, masked_term
from softtrace.loss.options import DensityOptions
from softtrace.loss.transfers import LaterChecks
from softtrace.loss.windows import Windows
from softtrace.model.state import dropout_off, uncompiled
from softtrace.tracing.instrument import Instrument

_NUMBERS = len(MaskedTerm._fields)


class CapturedTerms:
    """Runs masked runs, captured where they can be; of one model at a time.

    Args:
        later: asks whether what was replayed is finite.

    Attributes:
        memory: that its graphs work in, and those of what else is captured for the same term.
    """

    def __init__(self, later: LaterChecks) -> None:
        self._later, self.memory = later, GraphMemory()
        self.graphs = CudaGraphs(
            "the masked runs",
            "With cuda_graph=False they come as seldom as suits that (every=8, share=0.3).",
        )

    def __call__(
        self, instrument: Instrument, windows: Windows, options: DensityOptions
    ) -> MaskedTerm | None:
        """See :func:`softtrace.loss.masked_term.masked_term`.

        Raises:
            NonFiniteError: logits are not finite; of a replay it is said later, and its term is 0.
        """
        model = instrument.model

        def capture(fuse: bool) -> Captured:
            own = _copy(windows)
            run = term_and_gradients(instrument, own, replace(options, fuse=fuse))
            return Captured(run, _tensors(own), _NUMBERS, model, self.memory)

        graph, static = None, False
        if options.cuda_graph and capturable(windows.batch.input_ids, model):
            shapes = [tuple(each.shape) for each in _tensors(windows)]
            key = key_of(instrument, options, *shapes, windows.batch.packed)
            graph = self.graphs.of(key, capture, bool(options.fuse))
            # Like what is captured, so that a resumed run, which captures anew, computes the same
            # up to the rounding of what was fused.
            static = not self.graphs.refused
        if graph is not None:
            replayed = MaskedTerm(*graph.replay(_tensors(windows)))
            assert replayed.finite is not None
            self._later.ask(replayed.finite, MASKED_LOGITS)
            return replayed
        # Once for all runs: a module's mode takes longer to switch than to ask for.
        with dropout_off(model), uncompiled(model):
            found = masked_term(instrument, windows, options, static=static)
        if found is not None:
            found.check()
        return found


def term_and_gradients(
    instrument: Instrument,
    windows: Windows,
    options: DensityOptions,
    backend: str = "inductor",
) -> Run:
    """A static run of these windows and its backward pass, to be called again and again.

    It reads the model's weights and the windows where they lie, and gives the scalars of
    :class:`MaskedTerm` and then a gradient for every weight that is trained, None where none is.

    Args:
        instrument: of the model.
        windows: whose values may change between calls.
        options: of the term.
        backend: of ``torch.compile``, with ``options.fuse``.
    """
    model = instrument.model
    weights = [each.detach() for each in model.parameters()]

    def run(given: Sequence[Tensor], into: Tensors | None = None) -> Tensors:
        shared = shared_weights(model, given[: len(weights)])
        own = _with_tensors(windows, given[len(weights) :])
        found = with_weights(
            model, shared, lambda: masked_term(instrument, own, options, static=True)
        )
        assert found is not None
        assert found.finite is not None
        trained = [each for each in shared.values() if each.requires_grad]
        gradients: Tensors = [None] * len(trained)
        places = [None] * len(trained) if into is None else into[_NUMBERS:]
        term = zero_unless(found.finite, found.term, trained, places)
        if found.term.requires_grad:
            gradients = torch.autograd.grad(found.term, trained, allow_unused=True)
        return [term, *(None if each is None else each.detach() for each in found[1:]), *gradients]

    inputs = [*weights, *_tensors(windows)]
    return fused(run, inputs, backend) if options.fuse else partial(run, inputs)


def _copy(windows: Windows) -> Windows:
    return Windows(
        windows.batch.part(torch.clone), windows.thresholds.clone(), windows.depths.clone()
    )


def _tensors(windows: Windows) -> list[Tensor]:
    batch = windows.batch
    own = [batch.input_ids, batch.valid, batch.targets, batch.counted]
    more = [] if batch.positions is None else [batch.positions]
    return [*own, *more, windows.thresholds, windows.depths]


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
