"""What a recording run saw: all that masked runs, exits and measures are made from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softtrace.graph.batch import Batch
from softtrace.graph.edges import EdgeImportance


@dataclass(frozen=True)
class Recording:
    """What a recording run saw.

    Attributes:
        batch: that ran; masked runs take it again.
        logits: ``[B, T, V]``, the full model's.
        importance: of every edge.
        attention: probabilities of each layer, ``[B, H, T, S]``, for masked runs; empty if not
            kept.
        hidden: residual stream entering each layer, then entering the final norm: L + 1 tensors
            ``[B, T, d_model]``; None unless asked for.
    """

    batch: Batch
    logits: Tensor
    importance: EdgeImportance
    attention: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...] | None
