"""What is read of a batch, and what of it would be passed by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from softtrace.errors import InvalidInputError
from softtrace.loss.inputs import batch_inputs

IDS = torch.arange(6).reshape(2, 3)


def test_tokens_and_what_belongs_to_them_are_read() -> None:
    found = batch_inputs({"input_ids": IDS, "labels": IDS, "pixel_values": None, "index": 3})
    assert set(found) == {"input_ids", "attention_mask", "position_ids", "labels"}
    assert found["attention_mask"] is None


@pytest.mark.parametrize(
    "name", ["pixel_values", "pixel_values_videos", "input_features", "inputs_embeds"]
)
def test_images_and_sounds_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"found {name} beside input_ids"):
        batch_inputs({"input_ids": IDS, name: torch.zeros(1)})


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_packed_documents_need_their_position_ids(options: dict[str, Any]) -> None:
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}]
    whole = DataCollatorWithFlattening(**options)(rows)
    assert batch_inputs(whole)["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    bare = DataCollatorWithFlattening(return_position_ids=False, **options)(rows)
    with pytest.raises(InvalidInputError, match=r"without position_ids.*return_position_ids=True"):
        batch_inputs(bare)
