"""Early exits: what the model would say if it stopped after a layer.

The residual stream after each layer is read with the model's own final norm and head, as
self-speculation does (LayerSkip, arXiv 2404.16710).
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrace.instrument import Instrument, Recording


@torch.no_grad()
def exit_agreement(instrument: Instrument, recording: Recording) -> Tensor:
    """Whether the exit after each layer has the full model's most likely token.

    Args:
        instrument: of the model.
        recording: made with ``keep_hidden=True``.

    Returns:
        ``[L, B, T]`` bool; the last layer is the full model and always agrees.
    """
    if recording.hidden is None:
        raise ValueError("the recording has no hidden states; record with keep_hidden=True")
    wanted = recording.logits.argmax(-1)
    found = [
        instrument.anatomy.readout.early(hidden).argmax(-1) == wanted
        for hidden in recording.hidden[1:-1]
    ]
    return torch.stack([*found, torch.ones_like(wanted, dtype=torch.bool)])
