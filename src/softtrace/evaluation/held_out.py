"""What ``softtrace fit`` measures on held-out text at its end."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from softtrace.errors import DataError
from softtrace.evaluation.density_file import Density
from softtrace.evaluation.intervals import intervals_of
from softtrace.evaluation.measure import measure
from softtrace.evaluation.summary import summarise

_LEAST = 4  # tokens in a block: half is context, and the last one's target is not known


def measured(model: PreTrainedModel, blocks: Tensor, split: str) -> Density:
    """What a card says of a model, measured on a few blocks, with intervals; attention recomputed.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids; the first half of each is context.
        split: what the blocks are of.

    Raises:
        DataError: blocks of fewer than 4 tokens.
        UnsupportedModelError, NonFiniteError: see :func:`softtrace.density_curve`.
    """
    if blocks.shape[1] < _LEAST:
        raise DataError(
            f"blocks: found {blocks.shape[1]} tokens in each, allowed are {_LEAST} or more; take a "
            "larger block_size"
        )
    found = measure(
        model,
        blocks,
        min_context=blocks.shape[1] // 2,
        batch_size=8,
        extra_blocks=0,
        progress=lambda _: None,
    )
    return {
        **summarise(found),
        "data": {"blocks": len(blocks), "block_size": blocks.shape[1], "split": split},
        "attention": "recomputed",
        "intervals": intervals_of(found, len(blocks)),
    }
