"""Text for the report: what a few blocks need, token by token, and what small traces would say.

Every edge of importance >= τ is kept for many τ, once for all tokens. Each token then
takes, for each size of the slider, the run whose trace of *its own* is nearest to that size, and
says how large it really is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.data.blocks import evenly
from softtrace.density.curve import SIZES, default_thresholds
from softtrace.density.distortion import variation_from
from softtrace.density.easiness import loss_score
from softtrace.density.exits import exit_agreement, exit_layers
from softtrace.density.halving import Halving, Portion
from softtrace.density.sweep import curve_of, read_masked
from softtrace.evaluation.measure import ADVICE, Progress, RunsShown
from softtrace.evaluation.token_text import TokenText
from softtrace.graph.importance import working_dtype
from softtrace.graph.masks import hard_masks
from softtrace.graph.rowwise_sizes import traces_at
from softtrace.graph.sizes import total_edges
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind
from softtrace.tracing.recording import Recording

SAMPLE_SIZES = SIZES[::3]
"""The 9 sizes of the slider, of the 26."""

MOST_BLOCKS = 6
MOST_TOKENS = 192
"""Explained tokens of all texts together: the page stays under 3 MB with 8 runs on it."""

_CONTEXT = 160  # tokens shown before the first explained one
_TOP = 5
_THRESHOLDS = 24

SAMPLE_RUNS = _THRESHOLDS + len(default_thresholds())
"""Masked runs that a block of the samples takes."""


def _thresholds(length: int) -> list[float]:
    """0.6 down to 0.001 for blocks of up to 64 tokens, and lower for longer ones.

    A token's attention is shared out among all before it: in blocks of 1,024 no trace at 0.001 has
    more than two percent of the edges, and there predictions still have little of the full one.
    """
    lowest = 0.001 * min(1, 64 / length)
    last = _THRESHOLDS - 1
    return [0.6 * (lowest / 0.6) ** (step / last) for step in range(_THRESHOLDS)]


def _quiet(runs: int) -> None:
    """No progress is shown."""


@torch.no_grad()
def text_samples(
    model: nn.Module,
    tokenizer: Any,
    blocks: Tensor,
    *,
    min_context: int,
    batch_size: int,
    attention: AttentionKind = "recomputed",
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """The ``samples`` of ``density.json``: text, measures and predictions of a few blocks.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its tokenizer.
        blocks: ``[N, T]`` ids of all measured blocks, without padding.
        min_context: positions before this one are context only.
        batch_size: sequences a forward.
        attention: where masked runs take their attention probabilities from, see
            :func:`softtrace.density_curve`.
        progress: called with the number of masked runs of a block that were finished.

    Returns:
        ``sizes`` (shares of all edges, those of the slider), ``vocabulary`` (of each token that
        occurs what it says alone, and texts; all tokens and texts below are indices into it) and
        ``texts``, each with ``block`` (row of ``blocks``), ``context`` (texts of the tokens before,
        the nearest 160) and ``tokens``. A token is the one that was to be predicted: ``token``,
        ``text`` (what it adds to the text, where that is not what it says alone: see
        :class:`~softtrace.evaluation.token_text.TokenText`), ``entropy`` and ``loss`` in nats,
        ``area``, ``size`` (at TV 0.2, share of all edges), ``exit_layer`` (see
        :func:`~softtrace.density.exits.exit_layers`), ``edges`` (|E|), ``full`` and, one
        for each of ``sizes``, ``traces``: the real ``size`` of the trace, its ``tv`` and ``top``.
        ``full`` and ``top`` are the 5 most likely tokens, each with its probability.
    """
    instrument = attach(model)
    device = device_of_module(model)
    rows = evenly(torch.arange(len(blocks)), MOST_BLOCKS)
    explained = slice(min_context, min(blocks.shape[1] - 1, min_context + MOST_TOKENS // len(rows)))
    targets = slice(explained.start + 1, explained.stop + 1)
    known = slice(max(0, min_context + 1 - _CONTEXT), min_context + 1)
    batch = instrument.batch(blocks[rows].to(device))
    positions = torch.zeros_like(batch.valid)
    positions[:, explained] = True
    pieces, runs = _Pieces(tokenizer), RunsShown(progress)

    def work(portion: Portion) -> list[list[dict[str, Any]]]:
        """What is measured and predicted at some tokens of each sequence."""
        assert portion.chosen is not None
        places = portion.chosen[0].nonzero()[:, 0].tolist()
        own = slice(places[0], places[-1] + 1)
        recording = instrument.record(
            portion.batch,
            keep_hidden=True,
            keep_attention=attention == "recorded",
            positions=portion.chosen,
        )
        ran = runs.begin(portion, SAMPLE_RUNS)
        measured = _measures(instrument, recording, attention, own, ran)
        predicted = _predictions(instrument, recording, attention, own, ran, pieces)
        found = [{**one, **other} for one, other in zip(measured, predicted, strict=True)]
        return [found[start : start + len(places)] for start in range(0, len(found), len(places))]

    texts: list[dict[str, Any]] = []
    halving = Halving(batch_size, blocks.shape[1], ADVICE)
    for count, parts in halving.each(batch, positions, work):
        for row in range(count):
            block = int(rows[len(texts)])
            before, shown = (pieces.of_block(blocks[block], places) for places in (known, targets))
            found = [token for _, part in parts for token in part[row]]
            tokens = [{**token, **more} for token, more in zip(shown, found, strict=True)]
            context = [token.get("text", token["token"]) for token in before]
            texts.append({"block": block, "context": context, "tokens": tokens})
        runs.settle(count * SAMPLE_RUNS)
    return {"sizes": list(SAMPLE_SIZES), "vocabulary": pieces.texts, "texts": texts}


def _measures(
    instrument: Instrument,
    recording: Recording,
    attention: AttentionKind,
    explained: slice,
    ran: Callable[[], None],
) -> list[dict[str, Any]]:
    """What is measured of each of these tokens; one sequence after another."""
    positions = recording.positions
    assert positions is not None
    curve = curve_of(
        instrument,
        recording,
        recording.importance,
        default_thresholds(),
        attention=attention,
        positions=positions,
        ran=ran,
    )
    loss = torch.zeros_like(curve.entropy)
    loss[positions] = loss_score(recording.logits, recording.batch.targets[positions]).to(loss)
    columns = {
        "entropy": curve.entropy,
        "loss": loss,
        "area": curve.area(),
        "size": curve.size_at(),
        "exit_layer": exit_layers(exit_agreement(instrument, recording)),
        "edges": curve.edges,
    }
    values = [column[:, explained].flatten().tolist() for column in columns.values()]
    return [
        {name: _rounded(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*values, strict=True)
    ]


def _predictions(
    instrument: Instrument,
    recording: Recording,
    attention: AttentionKind,
    explained: slice,
    ran: Callable[[], None],
    pieces: _Pieces,
) -> list[dict[str, Any]]:
    """What the full model, and the trace nearest to each size, predict at each of these tokens."""
    full = recording.logits.to(working_dtype(recording.logits.dtype)).softmax(-1)
    batch = recording.batch.input_ids
    places = torch.arange(explained.start, explained.stop, device=batch.device)
    places = places.expand(len(batch), -1)
    total = total_edges(recording.importance, places).flatten().double()
    count = min(_TOP, full.shape[-1])
    sizes, variations, tops, chances = [], [], [], []
    for tau in _thresholds(batch.shape[1]):
        masks = hard_masks(recording.importance, tau)
        counts, needed = traces_at(masks, places)
        masks = needed if attention == "recorded" else masks
        read = read_masked(instrument, recording, masks, attention)
        masked = instrument.anatomy.readout.logits(read[:, explained].flatten(0, 1))
        best = masked.to(full.dtype).softmax(-1).topk(count)
        sizes.append(counts.sum((2, 3)).flatten().double() / total)
        variations.append(variation_from(full, masked))
        tops.append(best.indices)
        chances.append(best.values)
        ran()
    chosen = nearest(torch.stack(sizes), total)
    likely = full.topk(count)
    size, tv, top, chance = (torch.stack(x).tolist() for x in (sizes, variations, tops, chances))
    return [
        {
            "full": pieces.likely(likely.indices[token].tolist(), likely.values[token].tolist()),
            "traces": [
                {
                    "size": _rounded(size[run][token]),
                    "tv": _rounded(tv[run][token]),
                    "top": pieces.likely(top[run][token], chance[run][token]),
                }
                for run in runs
            ],
        }
        for token, runs in enumerate(chosen.T.tolist())
    ]


def nearest(size: Tensor, total: Tensor) -> Tensor:
    """Which run's trace is nearest to each of :data:`SAMPLE_SIZES`, by log size.

    Args:
        size: ``[K, n]`` shares of |E|, rising with K.
        total: ``[n]``, |E|; an empty trace stands at half an edge.

    Returns:
        ``[9, n]`` int64; of runs with equal traces the first.
    """
    held = torch.maximum(size, 0.5 / total).log()
    wanted = torch.tensor(SAMPLE_SIZES, dtype=held.dtype, device=held.device).log()
    return (held[None] - wanted[:, None, None]).abs().argmin(1)


def _rounded(value: float | int) -> float | int:
    """6 significant digits: 8 runs have to fit into a page."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


class _Pieces:
    """What each token that was met says alone, and texts that differ from that."""

    def __init__(self, tokenizer: Any) -> None:
        self._text = TokenText(tokenizer)
        self._index: dict[int | str, int] = {}
        self.texts: list[str] = []

    def index(self, token: int) -> int:
        """The place in ``texts`` of what a token says alone."""
        return self._place(token, self._text.alone(token))

    def of_block(self, block: Tensor, places: slice) -> list[dict[str, int]]:
        """``token`` and, where it differs from that, ``text`` of each token there, as indices."""
        tokens: list[int] = block.tolist()
        texts = self._text.of_text(tokens)
        return [
            {"token": self.index(token)}
            | ({} if text == self._text.alone(token) else {"text": self._place(text, text)})
            for token, text in zip(tokens[places], texts[places], strict=True)
        ]

    def _place(self, key: int | str, text: str) -> int:
        if key not in self._index:
            self._index[key] = len(self.texts)
            self.texts.append(text)
        return self._index[key]

    def likely(self, tokens: Sequence[int], chances: Sequence[float]) -> list[list[float | int]]:
        """``[index, probability]`` of each, to 4 decimals."""
        return [
            [self.index(token), round(chance, 4)]
            for token, chance in zip(tokens, chances, strict=True)
        ]
