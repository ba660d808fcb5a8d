"""The distance of early exits in a watched forward, on a GPU captured with its backward pass.

From the streams of the tokens that were drawn, everything that follows has the same shape at every
step: which of them are easy, their exits, the distance and its gradients. So a GPU replays it by
one call, and gradients by the exits' map are there with the others. Exits after a random number of
layers have other shapes at every step and are launched one operation at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from softtrace.graph.batch import require_finite
from softtrace.loss.cuda_graphs import (
    Captured,
    CudaGraphs,
    capturable,
    key_of,
    shared_weights,
    with_weights,
    written,
)
from softtrace.loss.draws import ExitDraw
from softtrace.loss.early_exits import CHUNK, FUSED_CHUNK, Seen, easiest, exit_distance, rows
from softtrace.loss.fused import Run, Tensors, cut, fused
from softtrace.loss.graph_memory import GraphMemory
from softtrace.loss.learned_maps import LearnedMaps
from softtrace.loss.options import DensityOptions
from softtrace.loss.transfers import LaterChecks
from softtrace.model.exit_maps import ExitMaps, name_of
from softtrace.tracing.instrument import Instrument

AT_ONCE = 2**28
"""Logits of exits that are held with their gradients at a time: half a gigabyte a copy in bfloat16.

More parts would need less, but each adds gradients of the whole head.
"""
_DISTANCES = "distances of early exits"
_NUMBERS = 3  # that a run gives before the gradients of what it was called with and of the weights


class ExitDistance(NamedTuple):
    """What the exits of a batch gave.

    Attributes:
        mean: distance of those that are used, nats, a scalar with a graph.
        finite: bool scalar, whether all of these distances were; None of a replay, where it is
            asked later and all is 0 if they were not.
        map_gradients: by maps, by their names, where these are there already; else None.
    """

    mean: Tensor
    finite: Tensor | None
    map_gradients: Mapping[str, Tensor] | None = None

    def check(self) -> None:
        """Raise :class:`NonFiniteError` if a distance is NaN or infinite."""
        if self.finite is not None:
            require_finite(self.finite, _DISTANCES)


class ExitTerm:
    """Reads the exits of one model.

    Args:
        maps: that its exits are read through; None for none.
        later: asks whether what was replayed is finite.
        memory: that its graphs work in.
    """

    def __init__(self, maps: LearnedMaps | None, later: LaterChecks, memory: GraphMemory) -> None:
        self.maps, self._later, self._memory = maps, later, memory
        self.graphs = CudaGraphs("early exits", "With cuda_graph=False no capture is tried.")

    def __call__(
        self,
        instrument: Instrument,
        seen: Seen,
        drawn: ExitDraw,
        targets: Tensor,
        options: DensityOptions,
        learned: bool,
    ) -> ExitDistance:
        """The mean distance of the exits of the easiest tokens among those that were drawn.

        Args:
            instrument: of the model.
            seen: a forward that ended.
            drawn: ``n`` tokens.
            targets: ``[B, T]``, what follows each token.
            options: of the term.
            learned: whether the model learns from it too, not the map alone.
        """
        lowest, highest = options.exit_bounds(len(instrument.anatomy.layers))
        there = options.cuda_graph and capturable(drawn.places, instrument.model)
        if lowest == highest and there:
            chosen = _Chosen.of(seen, drawn, targets, lowest)
            graph = self._graph(instrument, chosen, options)
            if graph is not None:
                mean, finite, *by_map = graph.replay(chosen.tensors(), [chosen.early])
                named = {name_of(lowest): each for each in by_map}
                self._later.ask(finite, _DISTANCES)
                return ExitDistance(mean if learned else mean.detach(), None, named)
            if not self.graphs.refused:
                # Like what is captured, so that a resumed run, which captures anew, computes the
                # same up to the rounding of what was fused.
                seen, drawn, targets = chosen.seen(), chosen.drawn(), chosen.targets[None]

        def read(hidden: Tensor, depth: int) -> Tensor:
            own = hidden if learned else hidden.detach()
            return own if self.maps is None else self.maps.read(own, depth)

        return exit_mean(instrument, seen, drawn, targets, options, read)

    def _graph(
        self, instrument: Instrument, chosen: _Chosen, options: DensityOptions
    ) -> Captured | None:
        maps = None if self.maps is None else self.maps.on(chosen.early.device)
        weight = None if maps is None else maps.weight(chosen.depth)

        def capture(fuse: bool) -> Captured:
            own = chosen.copy()
            run = exits_and_gradients(instrument, own, maps, replace(options, fuse=fuse))
            return Captured(run, own.tensors(), _NUMBERS, instrument.model, self._memory)

        shape = tuple(chosen.early.shape), chosen.early.dtype, chosen.depth
        read_in_place = None if weight is None else weight.data_ptr()
        key = key_of(instrument, options, shape, read_in_place)
        # Half a dozen kernels are compiled in seconds, whatever else of the training is.
        return self.graphs.of(key, capture, options.fuse is not False)


@dataclass(frozen=True)
class _Chosen:
    """What is read of ``n`` tokens whose exits all come after the same number of layers.

    Attributes:
        early: ``[n, d_model]``, the stream there.
        last: ``[n, d_model]``, the stream that the final norm reads.
        targets: ``[n]``, what follows.
        used: ``[n]`` bool, which of them take part.
        depth: the number of layers.
    """

    early: Tensor
    last: Tensor
    targets: Tensor
    used: Tensor
    depth: int

    @classmethod
    def of(cls, seen: Seen, drawn: ExitDraw, targets: Tensor, depth: int) -> _Chosen:
        assert seen.last is not None
        following = targets.flatten().index_select(0, drawn.places)
        last = rows(seen.last.detach(), drawn.places)
        return cls(rows(seen.streams[depth], drawn.places), last, following, drawn.used, depth)

    def tensors(self) -> list[Tensor]:
        return [self.early, self.last, self.targets, self.used]

    def copy(self) -> _Chosen:
        early, last, targets, used = (each.detach().clone() for each in self.tensors())
        return _Chosen(early, last, targets, used, self.depth)

    def seen(self) -> Seen:
        """The tokens as a forward of one row."""
        return Seen({self.depth: self.early[None]}, self.last[None], ended=True)

    def drawn(self) -> ExitDraw:
        """A draw of all of the tokens."""
        count = len(self.early)
        depths = torch.full((count,), self.depth, device="cpu")
        return ExitDraw(torch.arange(count, device=self.early.device), depths, self.used)


def exit_mean(
    instrument: Instrument,
    seen: Seen,
    drawn: ExitDraw,
    targets: Tensor,
    options: DensityOptions,
    read: Callable[[Tensor, int], Tensor],
) -> ExitDistance:
    """See :class:`ExitTerm`, and :func:`exit_distance` for ``read``."""
    drawn = _easiest(instrument, seen, drawn, targets, options, CHUNK)
    total, finite = _sum(instrument, seen, drawn, read)
    return ExitDistance(total / drawn.used.sum().clamp_min(1), finite)


def _easiest(
    instrument: Instrument,
    seen: Seen,
    drawn: ExitDraw,
    targets: Tensor,
    options: DensityOptions,
    chunk: int,
) -> ExitDraw:
    """The easiest tokens of a draw, whose exits are read."""
    readout, share = instrument.anatomy.readout, options.exit_quantile
    if share == 1:
        return drawn
    return easiest(seen, readout, drawn, targets, options.easiness, share, chunk)


def _sum(
    instrument: Instrument,
    seen: Seen,
    drawn: ExitDraw,
    read: Callable[[Tensor, int], Tensor],
    at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ of the distances of those that are used, and whether all of these are finite."""
    distances = exit_distance(seen, instrument.anatomy.readout, drawn, read, at_once)
    counted = torch.where(drawn.used, distances, 0.0)
    return counted.sum(), counted.detach().isfinite().all()


def _parts(drawn: ExitDraw, vocabulary: int) -> list[ExitDraw]:
    """The same tokens, so many at a time that :data:`AT_ONCE` says, in parts of one size."""
    count = len(drawn.places)
    rows = math.ceil(count / max(1, math.ceil(count * vocabulary / AT_ONCE)))
    each = (torch.split(values, rows) for values in (drawn.places, drawn.depths, drawn.used))
    return [ExitDraw(*part) for part in zip(*each, strict=True)]


def _part_by_part(
    sum_of: Callable[[ExitDraw], tuple[Tensor, Tensor]],
    parts: Sequence[ExitDraw],
    leaves: Sequence[Tensor],
    into: Tensors,
) -> tuple[Tensor, Tensor, Tensors]:
    """The mean of all distances, whether they are finite, and gradients; 0 where they are not.

    Each part has its backward pass at once, so that the logits of one part alone are held.

    Args:
        sum_of: the distances of a part, and whether they are finite.
        parts: of the tokens.
        leaves: by which gradients are taken.
        into: where each gradient is to lie, None for memory of its own.
    """
    count = torch.cat([part.used for part in parts]).sum().clamp_min(1)
    nothing: Tensors = [None] * len(leaves)
    # A sum lies where it is to lie in the end; of a single part there is nothing to add.
    sums = into if len(parts) > 1 else nothing
    means, finites, gradients = [], [], nothing
    for part in parts:
        if len(parts) > 1:
            part = replace(part, used=cut(part.used))
        total, all_finite = sum_of(part)
        mean = total / count
        means.append(mean.detach())
        added = torch.autograd.grad(mean, leaves, allow_unused=True)
        if len(parts) > 1:
            all_finite = cut(all_finite)
        finites.append(all_finite)
        gradients = [*map(_added, gradients, added, sums)]
        del added  # not held while the next part runs
    finite = torch.stack(finites).all()
    gradients = [written(finite, own, each) for own, each in zip(into, gradients, strict=True)]
    return torch.where(finite, torch.stack(means).sum(), 0.0), finite, gradients


def _added(total: Tensor | None, new: Tensor | None, into: Tensor | None) -> Tensor | None:
    """The sum of two gradients, in the memory of ``into`` where that is given."""
    if new is None:
        return total
    if total is None:
        return new if into is None else into.copy_(new)
    return torch.add(total, new, out=into)


def exits_and_gradients(
    instrument: Instrument,
    chosen: _Chosen,
    maps: ExitMaps | None,
    options: DensityOptions,
    backend: str = "inductor",
) -> Run:
    """Exits after one number of layers and their backward pass, to be called again and again.

    Args:
        instrument: of the model, whose weights are read where they lie.
        chosen: tokens, whose tensors may change between calls.
        maps: that exits are read through, likewise; None for none.
        options: of the term.
        backend: of ``torch.compile``, with ``options.fuse``.

    Returns:
        A function that gives the mean distance, whether all were finite, the gradient by the map,
        and then those by the early stream and by every weight that is trained, None where there is
        none: without a map, and all but the map's where the model does not learn (``exits=0``).
    """
    model = instrument.model
    weights = [each.detach() for each in model.parameters()]
    weight = None if maps is None else maps.weight(chosen.depth)
    chunk, at_once = (FUSED_CHUNK, sys.maxsize) if options.fuse else (CHUNK, None)
    drawn = chosen.drawn()  # here, for numbers of layers cannot be read from what is traced

    def run(given: Sequence[Tensor], into: Tensors | None = None) -> Tensors:
        shared = shared_weights(model, given[: len(weights)])
        early, last, targets, used, *own_map = (each.detach() for each in given[len(weights) :])
        for each in (early, *own_map):
            each.requires_grad_()
        own = replace(chosen, early=early, last=last, targets=targets, used=used)

        def read(hidden: Tensor, depth: int) -> Tensor:
            return hidden if maps is None else maps(hidden, depth, *own_map)

        trained = [each for each in shared.values() if each.requires_grad]
        leaves = [*own_map, *([early, *trained] if options.exits > 0 else [])]
        first = _NUMBERS - len(own_map)
        places = [None] * len(leaves) if into is None else into[first : first + len(leaves)]
        easy = with_weights(
            model,
            shared,
            lambda: _easiest(
                instrument, own.seen(), replace(drawn, used=used), targets[None], options, chunk
            ),
        )

        def sum_of(part: ExitDraw) -> tuple[Tensor, Tensor]:
            return with_weights(
                model, shared, lambda: _sum(instrument, own.seen(), part, read, at_once)
            )

        parts = _parts(easy, instrument.anatomy.readout.predicted)
        mean, finite, gradients = _part_by_part(sum_of, parts, leaves, places)
        of_map, others = gradients[: len(own_map)], gradients[len(own_map) :]
        nothing = [None] * (1 + len(trained) - len(others))
        return [mean, finite, *(of_map or [None]), *others, *nothing]

    inputs = [*weights, *chosen.tensors(), *([] if weight is None else [weight.detach()])]
    return fused(run, inputs, backend) if options.fuse else partial(run, inputs)
