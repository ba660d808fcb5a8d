"""How sure an exit is of a guess: what every bound on it is chosen by and compared with."""

from __future__ import annotations

from torch import Tensor

from softtrace.graph.importance import working_dtype


def surest(logits: Tensor) -> Tensor:
    """Probability of the most likely token, ``[...]`` for logits ``[..., V]``.

    They are the exit's own, before the generation config changes them. A draft ends where the
    probability is not at least the bound: also where it is not a number.
    """
    return logits.to(working_dtype(logits.dtype)).softmax(-1).amax(-1)
