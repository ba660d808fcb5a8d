"""What ``softtrace study --generation`` measures: densities along a model's own text.

The first half of every sequence is a prompt. Its second half is the text itself, or what the model
writes in its place. All have the same length, so that sizes of traces compare: token by token as
many edges end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrace.evaluation.measure import Progress
from softtrace.evaluation.study.readings import (
    Computation,
    computation_of,
    curves_and_surprisals,
    joined,
)
from softtrace.evaluation.study.writing import draws_for, write_on
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind

WRITERS = ("text", "greedy", "sampled")
"""Who wrote the second half: it is the text's own, or the model's, in one of two ways."""

BINS = 8
"""Into so many parts, as equal as can be, the new tokens are divided."""


@dataclass(frozen=True)
class Writing:
    """One second half on ``N`` sequences, with ``M`` new tokens of each.

    Attributes:
        ids: ``[N, T]``, the prompts with it.
        tokens: ``[N, M]``: what the prediction of each new token needs. The first of them is made
            from the prompt alone, and so is the same whoever writes.
    """

    ids: Tensor
    tokens: Computation


GenerationReadings = dict[str, Writing]
"""One model: a :class:`Writing` for each of :data:`WRITERS`."""


@torch.no_grad()
def read_generation(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int,
    seed: int,
    attention: AttentionKind,
    progress: Progress,
) -> GenerationReadings:
    """Let a model continue the first half of each block, and measure all three texts.

    Where weights are sharded all processes call this, each with as many blocks of its own.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids without padding; the first T // 2 of each are the prompt.
        batch_size: sequences a forward. What is drawn for a block does not depend on it.
        seed: of what is drawn.
        attention: of masked runs, see :func:`softtrace.density_curve`.
        progress: called with the number of sequences that were measured.
    """
    instrument = attach(model)
    prompt = blocks.shape[1] // 2
    new = blocks.shape[1] - prompt
    draws = draws_for(len(blocks), new, seed)
    found: dict[str, list[Writing]] = {writer: [] for writer in WRITERS}
    for text, drawn in zip(
        torch.split(blocks, batch_size), torch.split(draws, batch_size), strict=True
    ):
        before = text[:, :prompt]
        halves = text[:, prompt:], write_on(model, before, new), write_on(model, before, new, drawn)
        for writer, half in zip(WRITERS, halves, strict=True):
            ids = torch.cat((before, half), dim=1)
            found[writer].append(_read(instrument, ids, prompt, attention))
            progress(len(ids))
    return {writer: _together(parts) for writer, parts in found.items()}


def _read(instrument: Instrument, ids: Tensor, prompt: int, attention: AttentionKind) -> Writing:
    device = device_of_module(instrument.model)
    ids = ids.to(device)
    places = slice(prompt - 1, ids.shape[1] - 1)  # a token is predicted at the place before its own
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[:, places] = True
    tokens = [
        computation_of(curve, surprisal, places)
        for curve, surprisal in curves_and_surprisals(
            instrument, ids, attention, chosen, batch_size=len(ids)
        )
    ]
    return Writing(ids.cpu(), joined(tokens))


def _together(parts: Sequence[Writing]) -> Writing:
    return Writing(torch.cat([part.ids for part in parts]), joined([part.tokens for part in parts]))


def bins_of(new: int) -> list[tuple[int, int]]:
    """First and last of the new tokens, counted from 1, in each of :data:`BINS` parts."""
    parts = torch.arange(1, new + 1).tensor_split(BINS)
    return [(int(part[0]), int(part[-1])) for part in parts]
