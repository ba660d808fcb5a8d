"""What is read of the batches that a trainer hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from softtrace.errors import InvalidInputError
from softtrace.graph.batch import check_same_shape
from softtrace.model.wrappers import forward_parameters

#: what a model is run on; ``position_ids`` keep packed documents apart
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
#: what a model reads beside tokens: our own runs, on tokens alone, would read placeholders of it
_NOT_TOKENS = ("pixel_values", "input_features", "input_values", "inputs_embeds", "image_embeds")
#: where packed documents end, for models that are not told by position ids
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
#: ``[B, T]``, 1 at the tokens that count: those of completions, those that an assistant wrote
_MASKS = ("completion_mask", "assistant_masks")
#: prompts and what was written after them, as trainers that generate keep them apart (TRL's GRPO)
_APART = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")

MANY_BATCHES = 50
"""Batches without a target in a row, which one by one are normal, that a training should not have.
"""
NO_TARGETS = (
    f"labels: in {MANY_BATCHES} batches in a row that the density term looked at, no token has a "
    "target: each label is -100, or its token padding. So neither the term nor the task loss "
    "trains anything. Look at what makes the labels (an answer that is cut off because its prompt "
    "fills max_length, or a template by which no token is an answer's), and at the attention_mask"
)


def batch_inputs(batch: Any, who: str | None = "DensityPenalty") -> dict[str, Any]:
    """``input_ids`` of a batch, and where there are any its mask, labels and position ids.

    A batch without labels may say otherwise which tokens count, see :func:`_labels`.

    Args:
        batch: what a training or validation step is given.
        who: reads it, for the error; None for a class that the user made, as a Trainer is.

    Raises:
        InvalidInputError: no mapping, or no ``input_ids`` in it; images or sounds beside the
            tokens; packed documents without the position ids that keep them apart; a
            ``completion_mask`` of another shape than the ids.
    """
    is_mapping = isinstance(batch, Mapping)
    if is_mapping and "input_ids" not in batch and all(name in batch for name in _APART):
        batch = _joined(batch)
    if is_mapping and "input_ids" in batch:
        _check_others(batch)
        return {**{name: batch.get(name) for name in MODEL_INPUTS}, "labels": _labels(batch)}
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


def refuse_types(batch: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Refuse token types that the model reads, and that runs on its tokens alone would pass by.

    GPT-2 and its like add an embedding for each type, for type 0 too, which a tokenizer may hand
    out unasked. Models that also take images mark these by them; there 0 is text.

    Raises:
        InvalidInputError: the batch holds such types.
    """
    types = None if batch is None else batch.get("token_type_ids")
    if types is None or "token_type_ids" not in (read := forward_parameters(model)):
        return
    if "pixel_values" in read and not bool(types.any()):
        return
    raise InvalidInputError(
        f"batch: found token_type_ids, which {type(model).__name__} reads beside input_ids. Edges "
        "are measured on token ids alone, so that the term would be of other predictions; leave "
        "them out (return_token_type_ids=False of a tokenizer), or set its strength to 0"
    )


def _joined(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts ``[B, P]`` and completions ``[B, C]`` as rows ``[B, P + C]``, as they are run."""
    prompt_mask, mask = batch["prompt_mask"], batch["completion_mask"]
    own = mask * batch.get("tool_mask", 1)  # what tools answered is no token of the model's own
    return {
        **batch,
        "input_ids": torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1),
        "attention_mask": torch.cat((prompt_mask, mask), 1),
        "completion_mask": torch.cat((torch.zeros_like(prompt_mask), own), 1),
    }


def _labels(batch: Mapping[str, Any]) -> Any:
    """The labels of a batch, or those that its masks stand for where it has none.

    TRL's trainers on preferences hand out a ``completion_mask`` ``[B, T]``: 1 at the tokens of an
    answer, chosen or rejected, 0 at those of a prompt and at padding. ``assistant_masks`` are the
    same of a chat, as its tokenizer makes them; a token counts where all masks are 1. An integer
    ``logits_to_keep`` beside neither (TRL's A2PO) is how many tokens at the end are the answer.
    """
    labels = batch.get("labels")
    if labels is not None:
        return labels
    for name in _MASKS:
        mask = batch.get(name)
        if mask is not None:
            check_same_shape(name, mask, batch["input_ids"])
            labels = (batch["input_ids"] if labels is None else labels).masked_fill(mask == 0, -100)
    kept = batch.get("logits_to_keep")
    if labels is None and isinstance(kept, int) and kept > 0:
        labels = batch["input_ids"].clone()
        labels[:, :-kept] = -100
    return labels


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
