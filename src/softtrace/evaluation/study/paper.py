"""What ``softtrace study --paper`` measures: one prediction an input, by the paper's definitions.

As in arXiv 2605.27033 every input is a text whose next token is predicted once, and every size of
every subgraph is a masked run of its own with exactly so many edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from operator import itemgetter, methodcaller

import torch
from torch import Tensor, nn

from softtrace.density.components import component_entries
from softtrace.density.distortion import entropy, log_probabilities, total_variation
from softtrace.density.paper import (
    PAPER_SIZES,
    auc,
    by_depth_group,
    edge_count,
    nucleus_frequency,
    shared_nucleus,
)
from softtrace.evaluation.measure import Progress
from softtrace.graph.attention_maps import as_map
from softtrace.graph.edges import LayerEdges
from softtrace.graph.orders import (
    complement,
    connected_from,
    edges_entered,
    first_edges,
    random_order,
    search_order,
    with_residuals,
)
from softtrace.graph.reach import rows_at_once
from softtrace.graph.sizes import total_edges
from softtrace.model.devices import device_of_module
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.masking import AttentionKind, with_attention_kept
from softtrace.tracing.recording import Recording


@dataclass(frozen=True)
class PaperReadings:
    """One model on ``N`` inputs at the ``K`` sizes of :data:`softtrace.density.paper.PAPER_SIZES`.

    Attributes:
        sizes: ``[N, K]`` float64, shares of |E| that traces of int(s·|E|) edges have.
        trace, inverse, random: ``[N, K]`` TV of the trace, of what is left without it (residual
            edges kept), and of a random subgraph of as many edges (residual edges kept too).
        nucleus: ``[N, K]`` int64, ν in per cent.
        frequency: ``[N, K]`` float64, unigram frequency of the trace's top-5 nucleus; NaN where the
            corpus has none of it.
        loss: ``[N, K]`` nats, of the true next token.
        rank: ``[N, K]`` float64 of the true next token, from 1 for the most likely; the middle of
            the ranks of tokens that are equally likely.
        kinds: ``[N, K, 3]`` shares of attention, MLP and residual edges in the trace.
        depths: ``[N, K, 4]`` shares of the depth groups.
        connection: ``[N]`` float64, size of the smallest trace with a path from an embedding.
        entries: ``[N, C]`` float64, size of the smallest trace that contains each head and MLP;
            infinite for one that cannot reach the output.
        entropy: ``[N]`` nats, of the full prediction.
        auc: ``[N]`` float64, the computation density.
        edges: ``[N]`` int64, |E|.
    """

    sizes: Tensor
    trace: Tensor
    inverse: Tensor
    random: Tensor
    nucleus: Tensor
    frequency: Tensor
    loss: Tensor
    rank: Tensor
    kinds: Tensor
    depths: Tensor
    connection: Tensor
    entries: Tensor
    entropy: Tensor
    auc: Tensor
    edges: Tensor


@torch.no_grad()
def read_paper(
    model: nn.Module,
    blocks: Tensor | Sequence[Tensor],
    counts: Tensor,
    *,
    attention: AttentionKind,
    seed: int,
    progress: Progress,
) -> PaperReadings:
    """Measure one model; the last token of each block is what the others have to predict.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids without padding, or N tensors ``[T_n]`` of any lengths from 2.
        counts: ``[V]``, how often each token is in a corpus.
        attention: of masked runs, see :func:`softtrace.density_curve`.
        seed: of the random subgraphs; input n uses ``seed + n``.
        progress: called with 1 after each input.
    """
    instrument = attach(model)
    device = device_of_module(model)
    found = []
    for number, block in enumerate(blocks):
        batch = instrument.batch(block[None, :-1].to(device))
        recording = instrument.record(batch, keep_attention=attention == "recorded")
        found.append(_read(instrument, recording, int(block[-1]), counts, attention, seed + number))
        progress(1)
    names = [each.name for each in fields(PaperReadings)]
    return PaperReadings(
        **{name: torch.stack([getattr(each, name) for each in found]) for name in names}
    )


def _read(
    instrument: Instrument,
    recording: Recording,
    target: int,
    counts: Tensor,
    attention: AttentionKind,
    seed: int,
) -> PaperReadings:
    """Readings of one input, without their first dimension."""
    importance = recording.importance
    order, drawn = search_order(importance), random_order(importance, seed=seed)
    total = int(total_edges(importance)[0, -1])
    lengths = torch.tensor([edge_count(size, total) for size in PAPER_SIZES])
    sizes = lengths.double() / total
    masks, existing = first_edges(order, lengths), importance.existing()
    predict = partial(_last_logits, instrument, recording, attention)
    logits = predict(masks)
    full = recording.logits[0, -1].expand_as(logits)
    variation = total_variation(full, logits).cpu()
    others = (
        complement(masks, existing),
        with_residuals(first_edges(drawn, lengths), existing),
    )
    inverse, random = (total_variation(full, predict(each)).cpu() for each in others)

    # An empty trace reads as its first edge, as in the authors' aggregation.
    entered = edges_entered(order, lengths.clamp_min(1)).cpu().double()
    attention_edges, before, mlp, after = entered.sum(1).unbind(-1)
    every = entered.sum((1, 2))[:, None]
    connection = connected_from(order)
    entries = component_entries(order).cpu().double()
    return PaperReadings(
        sizes=sizes,
        trace=variation,
        inverse=inverse,
        random=random,
        nucleus=shared_nucleus(full, logits).cpu(),
        frequency=nucleus_frequency(logits, counts).cpu(),
        loss=-log_probabilities(logits)[:, target].cpu(),
        rank=_rank(logits, target).cpu(),
        kinds=torch.stack((attention_edges, mlp, before + after), dim=-1) / every,
        depths=by_depth_group(entered).sum(-1) / every,
        connection=torch.tensor(connection / total, dtype=torch.float64),
        entries=torch.where(entries > total, torch.inf, entries / total),
        entropy=entropy(full[0]).cpu(),
        auc=auc(sizes, variation),
        edges=torch.tensor(total),
    )


def _last_logits(
    instrument: Instrument,
    recording: Recording,
    attention: AttentionKind,
    masks: Sequence[LayerEdges],
) -> Tensor:
    """``[K, V]`` of the last position under each of K masks, several of them a batch."""
    read = []
    rows, together = len(masks[0].mlp), rows_at_once(masks)
    for start in range(0, rows, together):
        part = tuple(layer.map(itemgetter(slice(start, start + together))) for layer in masks)
        count = len(part[0].mlp)
        if attention == "kept":
            visible = [seen.expand(count, -1, -1) for seen in recording.importance.visible]
            part = with_attention_kept(part, visible)
        recorded = None
        if attention == "recorded":
            recorded = [
                as_map(each).whole().expand(count, -1, -1, -1) for each in recording.attention
            ]
        batch = recording.batch.part(methodcaller("expand", count, -1))
        read.append(instrument.masked_hidden(batch, part, recorded)[:, -1])
    logits: Tensor = instrument.anatomy.readout.logits(torch.cat(read))
    return logits


def _rank(logits: Tensor, target: int) -> Tensor:
    """``[K]`` float64: the place of a token among all, ties at the middle of theirs."""
    own = logits[:, target, None]
    return (logits > own).sum(-1) + ((logits == own).sum(-1).double() + 1) / 2
