"""What ``softtrace study`` measures of one model: sums and numbers of every sequence.

Sequences are the unit that intervals are made of, so nothing is added up over them. Of every token
only a few numbers are kept, of everything over sizes only sums over a sequence's tokens: memory
does not grow with the vocabulary or with the number of masked runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from softtrace.density.curve import DensityCurve
from softtrace.density.easiness import loss_score
from softtrace.density.halving import Halving, Portion
from softtrace.errors import InvalidInputError
from softtrace.evaluation.measure import ADVICE, Progress, trace_curve
from softtrace.evaluation.study.unigrams import Unigrams
from softtrace.graph.edges import EDGE_KINDS
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind

T = TypeVar("T")

STUDY_SIZES: tuple[float, ...] = tuple(10 ** (-4 + step / 6) for step in range(25))
"""25 sizes, log-spaced from 1e-4 to 1; where construction ends is one of them."""


@dataclass(frozen=True)
class Computation:
    """What tokens need, one number each; ``N`` sequences, ``M`` tokens of each.

    Attributes:
        size: ``[N, M]`` share of all edges at TV 0.2.
        edges: ``[N, M]`` their number.
        area: ``[N, M]`` mean TV over log10 of the size.
        attention: ``[N, M]`` share of attention edges among them; NaN for an empty trace.
        entropy, surprisal: ``[N, M]`` nats, of the full prediction.
    """

    size: Tensor
    edges: Tensor
    area: Tensor
    attention: Tensor
    entropy: Tensor
    surprisal: Tensor


@dataclass(frozen=True)
class Readings:
    """One model on all sequences.

    Attributes:
        whole: the explained tokens of the sequences, each with all that stands before it.
        variation: ``[N, 25]`` TV at :data:`STUDY_SIZES`, summed over a sequence's tokens.
        composition: ``[N, 25, 4, 4]`` edges by depth quartile and kind, summed.
        nucleus: ``[N, 25, 8]`` recovered top-p lists, summed.
        unigram: ``[N, 25, 2]`` comparisons with the corpus' unigrams, summed.
        ends: ``[P]`` places in the sequence of the tokens that windows explain.
        first: place of the first explained token.
        windows: length to the tokens at ``ends``, each seen with just so many tokens, its own
            included.
    """

    whole: Computation
    variation: Tensor
    composition: Tensor
    nucleus: Tensor
    unigram: Tensor
    ends: Tensor
    first: int
    windows: dict[int, Computation]

    def whole_at_ends(self) -> Computation:
        """The tokens at ``ends``, with all that stands before them: ``[N, P]``."""
        places = self.ends - self.first
        return Computation(**{name: values[:, places] for name, values in vars(self.whole).items()})


def window_ends(block_size: int, first: int, longest: int, count: int) -> Tensor:
    """Where windows end: places in a block that have ``longest`` tokens and are explained.

    Args:
        block_size: tokens of a block; the last one's target is not known.
        first: the first place that is explained.
        longest: tokens of the longest window.
        count: how many places, evenly spaced; fewer if there are not as many.

    Returns:
        ``[P]`` int64, rising.

    Raises:
        InvalidInputError: no place has that many tokens before it.
    """
    low, high = max(first, longest - 1), block_size - 2
    if low > high:
        raise InvalidInputError(
            f"lengths: found {longest}, allowed are at most {block_size - 1}, so that a token of a "
            f"block of {block_size} has a window before it and a target after it; take shorter "
            "lengths or a larger block_size"
        )
    places = torch.linspace(low, high, count).round().long().tolist()
    return torch.tensor(sorted(set(places)))


def windows_of(blocks: Tensor, ends: Tensor, length: int, beginning: Tensor) -> Tensor:
    """Windows of one length that end at given places, ``[N, P, length]``.

    Args:
        blocks: ``[N, T]`` ids.
        ends: ``[P]``, each at least ``length - 1``.
        length: of a window.
        beginning: tokens that the tokenizer puts in front of a text, ``[length - 1]`` at most: a
            window begins with them, in the place of its first ones, as the block does.
    """
    windows = blocks.unfold(1, length, 1)[:, ends - length + 1].clone()
    windows[..., : len(beginning)] = beginning
    return windows


@torch.no_grad()
def read_model(
    model: nn.Module,
    blocks: Tensor,
    unigrams: Unigrams,
    *,
    first: int,
    ends: Tensor,
    lengths: tuple[int, ...],
    batch_size: int,
    progress: Progress,
    beginning: Tensor | None = None,
    attention: AttentionKind = "recomputed",
) -> Readings:
    """Measure one model on blocks of one length, without padding.

    Where weights are sharded all processes call this, each with as many blocks of its own, and each
    gets the readings of its own.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids.
        unigrams: of the corpus, over the model's vocabulary.
        first: explained are the tokens from this place to the last but one.
        ends: see :func:`window_ends`.
        lengths: of the windows.
        batch_size: sequences a forward, halved where memory runs out.
        progress: called with the number of sequences and windows that were run.
        beginning: of texts, see :func:`windows_of`; None for nothing.
        attention: of masked runs, see :func:`softtrace.density_curve`.
    """
    instrument = attach(model)
    device = device_of_module(model)
    explained = slice(first, blocks.shape[1] - 1)
    chosen = torch.zeros_like(blocks, dtype=torch.bool, device=device)
    chosen[:, explained] = True
    tokens: list[Computation] = []
    sums: list[tuple[Tensor, ...]] = []
    for curve, surprisal in curves_and_surprisals(
        instrument, blocks.to(device), attention, chosen, batch_size, unigrams
    ):
        tokens.append(computation_of(curve, surprisal, explained))
        over_sizes = (None, curve.composition, curve.nucleus, curve.readings)
        sums.append(
            tuple(
                curve.at_sizes(STUDY_SIZES, values)[:, :, explained].sum(2).transpose(0, 1).cpu()
                for values in over_sizes
            )
        )
        progress(len(surprisal))
    begun = blocks.new_empty(0) if beginning is None else beginning
    windows = {
        length: _windows(
            instrument,
            windows_of(blocks, ends, length, begun),
            blocks[:, ends + 1],
            batch_size,
            device,
            progress,
            attention,
        )
        for length in lengths
    }
    variation, composition, nucleus, unigram = map(torch.cat, zip(*sums, strict=True))
    return Readings(joined(tokens), variation, composition, nucleus, unigram, ends, first, windows)


def _windows(
    instrument: Instrument,
    windows: Tensor,
    targets: Tensor,
    batch_size: int,
    device: torch.device,
    progress: Progress,
    attention: AttentionKind,
) -> Computation:
    """``[N, P]`` readings of the last token of every window.

    Args:
        instrument: of the model.
        windows: ``[N, P, length]`` ids.
        targets: ``[N, P]``, the token after each.
        batch_size, device, progress, attention: see :func:`read_model`.
    """
    length = windows.shape[-1]
    last = slice(length - 1, length)
    ids = windows.flatten(0, 1).to(device)
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[:, last] = True
    found = []
    for curve, surprisal in curves_and_surprisals(
        instrument, ids, attention, chosen, batch_size, target=targets.flatten().to(device)
    ):
        found.append(computation_of(curve, surprisal, last))
        progress(len(surprisal))
    together = vars(joined(found))
    return Computation(**{name: v.reshape(targets.shape) for name, v in together.items()})


def curves_and_surprisals(
    instrument: Instrument,
    ids: Tensor,
    attention: AttentionKind,
    explained: Tensor,
    batch_size: int,
    unigrams: Unigrams | None = None,
    target: Tensor | None = None,
) -> Iterator[tuple[DensityCurve, Tensor]]:
    """The curves of some sequences, and the surprisal ``[B, T]`` of the token after each.

    In batches, which are halved where memory runs out, see
    :class:`softtrace.density.halving.Halving`.

    Args:
        instrument: of the model.
        ids: ``[N, T]``.
        attention: of masked runs.
        explained: ``[N, T]`` bool, the positions that are measured; the others are NaN.
        batch_size: sequences of a batch, to begin with.
        unigrams: what predictions are compared with; None also leaves out nucleus recovery.
        target: ``[N]``, the token after the last; None where it is not known.

    Raises:
        InvalidInputError: not even one position of one sequence fits.
    """

    def work(portion: Portion) -> tuple[DensityCurve, Tensor]:
        batch, chosen = portion.batch, portion.chosen
        assert chosen is not None
        recording = instrument.record(
            batch, keep_attention=attention == "recorded", positions=chosen
        )
        curve = trace_curve(
            instrument,
            recording,
            attention=attention,
            nucleus=unigrams is not None,
            reader=None if unigrams is None else unigrams.read,
            positions=chosen,
        )
        targets = batch.targets.clone()
        if target is not None:
            targets[:, -1] = target[portion.first : portion.first + len(targets)]
        surprisal = torch.full_like(curve.entropy, torch.nan)
        surprisal[chosen] = loss_score(recording.logits, targets[chosen]).to(surprisal.dtype)
        return curve, surprisal

    halving = Halving(batch_size, ids.shape[1], ADVICE)
    for _, parts in halving.each(instrument.batch(ids), explained, work):
        (_, (curve, surprisal)), *others = parts
        for places, (other, more) in others:
            assert places is not None
            curve, surprisal = curve.filled(other, places), torch.where(places, more, surprisal)
        yield curve, surprisal


def computation_of(curve: DensityCurve, surprisal: Tensor, places: slice) -> Computation:
    """What the tokens of a batch need at these places, on the CPU.

    Args:
        curve: of the batch, ``[B, T]`` positions.
        surprisal: ``[B, T]`` nats.
        places: of the positions.
    """
    size = curve.size_at()
    edges = curve.at_sizes(size[None], curve.composition)[0].sum(2)
    attention = edges[..., EDGE_KINDS.index("attention")] / edges.sum(-1)  # 0 / 0 if it is empty
    found = {
        "size": size,
        "edges": size * curve.edges,
        "area": curve.area(),
        "attention": attention,
        "entropy": curve.entropy,
        "surprisal": surprisal,
    }
    return Computation(**{name: values[:, places].cpu() for name, values in found.items()})


def joined(parts: Sequence[T]) -> T:
    """Dataclasses of tensors, one for each batch, as one for all of them."""
    names = vars(parts[0])
    return type(parts[0])(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})
