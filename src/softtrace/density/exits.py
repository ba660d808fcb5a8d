"""Early exits: what the model would say if it stopped after a layer.

The residual stream after each layer is read with the model's own final norm and head, as
self-speculation does (LayerSkip, arXiv 2404.16710), through the exit's map where the model has one
(:mod:`softtrace.model.exit_maps`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from softtrace.anatomy.readout import Readout
from softtrace.model.alone import alone
from softtrace.tracing.instrument import Instrument
from softtrace.tracing.recording import Recording


@torch.no_grad()
def exit_agreement(instrument: Instrument, recording: Recording) -> Tensor:
    """Whether the exit after each layer has the full model's most likely token.

    Args:
        instrument: of the model.
        recording: made with ``keep_hidden=True``.

    Returns:
        ``[L, B, T]`` bool; the last layer is the full model and always agrees. Of a recording of
        chosen positions all others agree too.
    """
    measured = recording.positions
    if measured is None:
        measured = torch.ones_like(recording.batch.valid)
    streams = (
        instrument.exit_stream(hidden[measured], depth)
        for depth, hidden in enumerate(hidden_states(recording)[1:-1], start=1)
    )
    wanted = recording.logits.argmax(-1).flatten()
    with alone(instrument.model):
        found = _agreeing(instrument.anatomy.readout, streams, wanted)
    agreed = measured.new_ones(len(found) + 1, *measured.shape)
    agreed[:-1, measured] = found
    return agreed


def _agreeing(readout: Readout, streams: Iterable[Tensor], wanted: Tensor) -> Tensor:
    """Whether the likeliest token of an exit is the wanted one, ``[E, n]`` bool.

    Mostly it is not, and that is cheap to see: a token that is wanted at another position is
    likelier. The whole vocabulary is read only where no such token is.

    Args:
        readout: of the model.
        streams: of each of E exits, as the final norm reads them, ``[n, d_model]``.
        wanted: ``[n]`` int64.
    """
    tokens, own = torch.unique(wanted, return_inverse=True)
    undecided, unread = [wanted.new_empty(0, len(wanted), dtype=torch.bool)], []
    for stream in streams:
        may = torch.ones_like(wanted, dtype=torch.bool)
        few = readout.early_of(stream, tokens)
        if few is not None:
            may = (few <= few.gather(1, own[:, None])).all(1)
        undecided.append(may[None])
        unread.append(stream[may])
    agreed = torch.cat(undecided)
    if unread:
        # At most as many as an exit has positions, so that their logits fit where one exit's do.
        parts = torch.split(torch.cat(unread), max(1, len(wanted)))
        likeliest = torch.cat([readout.early(part).argmax(-1) for part in parts])
        agreed[agreed.clone()] = likeliest == wanted.expand_as(agreed)[agreed]
    return agreed


def hidden_states(recording: Recording) -> Sequence[Tensor]:
    """The residual stream entering each layer, then the final norm, of a recording."""
    if recording.hidden is None:
        raise ValueError("the recording has no hidden states; record with keep_hidden=True")
    return recording.hidden


def exit_layers(agreed: Tensor) -> Tensor:
    """The first layer from which on every exit agrees: later ones do not change their mind.

    Args:
        agreed: ``[L, ...]`` bool, see :func:`exit_agreement`; the last layer always agrees.

    Returns:
        ``[...]`` int64, 1 to L.
    """
    from_here_on = agreed.flip(0).int().cummin(0).values
    return len(agreed) + 1 - from_here_on.sum(0)
