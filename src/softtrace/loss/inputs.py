"""What is read of the batches that a trainer hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softtrace.errors import InvalidInputError

#: what a model is run on; ``position_ids`` keep packed documents apart
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def batch_inputs(batch: Any, who: str | None = "DensityPenalty") -> dict[str, Any]:
    """``input_ids`` of a batch, and where there are any its mask, labels and position ids.

    Args:
        batch: what a training or validation step is given.
        who: reads it, for the error; None for a class that the user made, as a Trainer is.

    Raises:
        InvalidInputError: no mapping, or no ``input_ids`` in it.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return {name: batch.get(name) for name in (*MODEL_INPUTS, "labels")}
    is_mapping = isinstance(batch, Mapping)
    found = str(sorted(map(str, batch))) if is_mapping else f"a {type(batch).__name__}"
    wanted = "'input_ids' (and 'attention_mask', 'labels' where there are any)"
    if who is None:
        raise InvalidInputError(
            f"inputs: found {found}, expected {wanted}. Override inputs_of for other batches"
        )
    keys_of = "a mapping with keys " if is_mapping else ""
    raise InvalidInputError(
        f"batch: found {keys_of}{found}, expected a mapping with {wanted}. "
        f"Override {who}.inputs_of for other batches"
    )
