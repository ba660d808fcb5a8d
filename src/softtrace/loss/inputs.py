"""What is read of the batches that a trainer hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softtrace.errors import InvalidInputError

#: what a model is run on; ``position_ids`` keep packed documents apart
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
#: what a model reads beside tokens: our own runs, on tokens alone, would read placeholders of it
_NOT_TOKENS = ("pixel_values", "input_features", "input_values", "inputs_embeds", "image_embeds")
#: where packed documents end, for models that are not told by position ids
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def batch_inputs(batch: Any, who: str | None = "DensityPenalty") -> dict[str, Any]:
    """``input_ids`` of a batch, and where there are any its mask, labels and position ids.

    Args:
        batch: what a training or validation step is given.
        who: reads it, for the error; None for a class that the user made, as a Trainer is.

    Raises:
        InvalidInputError: no mapping, or no ``input_ids`` in it; images or sounds beside the
            tokens; packed documents without the position ids that keep them apart.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        _check_others(batch)
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


def _check_others(batch: Mapping[str, Any]) -> None:
    """Refuse what a batch holds that runs on its tokens alone would pass by."""
    given = sorted(str(name) for name, value in batch.items() if value is not None)
    other = [name for name in given if name.startswith(_NOT_TOKENS)]
    if other:
        raise InvalidInputError(
            f"batch: found {', '.join(other)} beside input_ids. Edges are measured on token ids "
            "alone, where placeholders would stand for images or sounds; give the term batches of "
            "text alone (set its strength to 0 for this data)"
        )
    packed = [name for name in given if name in _BOUNDARIES]
    if packed and batch.get("position_ids") is None:
        raise InvalidInputError(
            f"batch: found {', '.join(packed)} without position_ids, which say where packed "
            "documents begin; let the collator return them too "
            "(DataCollatorWithFlattening(return_position_ids=True), its default)"
        )
