"""How sure an exit is of a guess: what every bound on it is chosen by and compared with."""

from __future__ import annotations

from torch import Tensor

from softtrace.graph.importance import working_dtype


def surest(logits: Tensor) -> Tensor:
    """Probability of the most likely token, ``[...]`` for logits ``[..., V]``.

    They are the exit's own, before the generation config changes them. A draft goes on where the
    probability is the bound at least: one that is not a number ends it.
    """
    return logits.to(working_dtype(logits.dtype)).softmax(-1).amax(-1)
