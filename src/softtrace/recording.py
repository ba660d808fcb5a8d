"""What a recording run saw: all that masked runs, exits and measures are made from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from softtrace.batch import is_packed
from softtrace.graph import EdgeImportance


@dataclass(frozen=True)
class Recording:
    """What a recording run saw.

    Attributes:
        logits: ``[B, T, V]``, the full model's.
        importance: of every edge.
        attention: probabilities of each layer, ``[B, H, T, S]``, for masked runs; empty if not
            kept.
        hidden: residual stream entering each layer, then entering the final norm: L + 1 tensors
            ``[B, T, d_model]``; None unless asked for.
        positions: ``[B, T]`` position ids of packed rows, for masked runs; None otherwise.
    """

    logits: Tensor
    importance: EdgeImportance
    attention: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...] | None
    positions: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """Attention mask for masked runs of the same batch; None where documents are packed."""
        valid = self.importance.valid
        packed = self.positions is not None and is_packed(self.positions, valid)
        return None if packed else valid.long()
