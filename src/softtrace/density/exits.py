"""Early exits: what the model would say if it stopped after a layer.

The residual stream after each layer is read with the model's own final norm and head, as
self-speculation does (LayerSkip, arXiv 2404.16710), through the exit's map where the model has one
(:mod:`softtrace.model.exit_maps`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    wanted = recording.logits.argmax(-1)
    chosen = recording.positions
    found = []
    for depth, hidden in enumerate(hidden_states(recording)[1:-1], start=1):
        read = hidden if chosen is None else hidden[chosen]
        found.append(instrument.read_exit(read, depth).argmax(-1) == wanted)
    agreed = torch.stack([*found, torch.ones_like(wanted, dtype=torch.bool)])
    if chosen is None:
        return agreed
    placed = agreed.new_ones(len(agreed), *chosen.shape)
    placed[:, chosen] = agreed
    return placed


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
