"""Work on a batch for which memory does not suffice: done in parts, and the parts put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from softtrace.density.curve import DensityCurve
from softtrace.errors import InvalidInputError
from softtrace.graph.attention_maps import none_held
from softtrace.graph.batch import Batch
from softtrace.model.memory import Portions, half_that_fits

T = TypeVar("T")


class Portion(NamedTuple):
    """Some sequences of a batch.

    Attributes:
        batch: of these sequences.
        chosen: ``[B, T]`` bool, which of their positions are measured; None for all.
        first: number of the first of them.
        before: part of their positions that was measured before, of a sequence that is measured in
            parts.
        share: part of their positions that this is.
    """

    batch: Batch
    chosen: Tensor | None
    first: int
    before: float = 0.0
    share: float = 1.0


class Halving:
    """Does some work on batches, of which it halves what does not fit into memory.

    First the batch is halved. Of a sequence that does not fit by itself no attention maps are held,
    and then the positions that are measured are halved. What was halved stays so for later batches.

    Args:
        batch_size: sequences at a time, to begin with.
        positions: of a sequence, at most.
        advice: how a user can take less memory, for the end of a sentence.
    """

    def __init__(self, batch_size: int, positions: int, advice: str) -> None:
        self.sequences = Portions(batch_size, "sequence(s)", "parts of one")
        self.positions = Portions(positions, "position(s) of a sequence")
        self.advice = advice

    def each(
        self, batch: Batch, chosen: Tensor | None, work: Callable[[Portion], T]
    ) -> Iterator[tuple[int, list[tuple[Tensor | None, T]]]]:
        """Do the work on a batch.

        Args:
            batch: to be worked on.
            chosen: ``[B, T]`` bool, the positions that are measured; None for all.
            work: on some of the sequences, and some of the positions.

        Yields:
            A number of sequences, and what the work gave beside the positions ``[B, T]`` that it
            was done for: several times where a sequence did not fit by itself.

        Raises:
            InvalidInputError: not even one position of one sequence fits.
        """

        def portion(first: int, end: int) -> Portion:
            part = batch.part(lambda values: values[first:end])
            return Portion(part, None if chosen is None else chosen[first:end], first)

        def of_sequences(first: int, end: int) -> list[tuple[Tensor | None, T]]:
            own = portion(first, end)
            return [(own.chosen, work(own))]

        def of_one(row: int) -> list[tuple[Tensor | None, T]]:
            with none_held():
                return self._by_positions(portion(row, row + 1), work)

        return self.sequences.each(0, len(batch.valid), of_sequences, of_one)

    def _by_positions(
        self, one: Portion, work: Callable[[Portion], T]
    ) -> list[tuple[Tensor | None, T]]:
        """What the work gives of some positions of one sequence at a time."""
        valid = one.batch.valid
        places = (valid if one.chosen is None else one.chosen)[0].nonzero()[:, 0]

        def of_positions(first: int, end: int) -> tuple[Tensor | None, T]:
            some = torch.zeros_like(valid)
            some[0, places[first:end]] = True
            before, share = first / count, (end - first) / count
            return some, work(one._replace(chosen=some, before=before, share=share))

        def refuse(place: int) -> NoReturn:
            self._refuse(one, work)

        count = max(1, len(places))  # of a sequence in which nothing is measured there is one part
        return [found for _, found in self.positions.each(0, count, of_positions, refuse)]

    def _refuse(self, one: Portion, work: Callable[[Portion], T]) -> NoReturn:
        """Refuse a sequence of which not one position fits, after trying which length does.

        Raises:
            InvalidInputError: always.
        """
        real = one.batch.valid[0].nonzero()[:, 0]

        def of_length(length: int) -> T:
            part = one.batch.part(lambda values: values[:, real[:length]])
            some = torch.zeros_like(part.valid)
            some[:, -2] = True  # the last one's target is not known
            return work(one._replace(batch=part, chosen=some))

        fits = half_that_fits(len(real), 2, of_length)
        allowed = f"{fits:,} tokens fit here" if fits else "allowed is what fits"
        raise InvalidInputError(
            f"input_ids: memory ran out at one position of one sequence of {len(real):,} tokens; "
            f"{allowed}. Take {self.advice}"
        )


def curve_in_portions(
    batch: Batch, chosen: Tensor | None, work: Callable[[Portion], DensityCurve]
) -> DensityCurve:
    """The curve of a batch, made of those of its parts where memory runs out.

    Args:
        batch, chosen, work: see :meth:`Halving.each`.
    """
    advice = "shorter sequences, a smaller dtype of the weights, or device_map='auto'"
    batch_size, length = batch.valid.shape
    halving = Halving(batch_size, length, advice)
    rows = []
    for _, ((_, curve), *others) in halving.each(batch, chosen, work):
        for places, other in others:
            assert places is not None
            curve = curve.filled(other, places)
        rows.append(curve)
    return rows[0].beside(rows[1:])
