"""What is read of a batch, and what of it would be passed by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening

from softtrace.errors import InvalidInputError
from softtrace.loss import DensityLoss
from softtrace.loss.inputs import batch_inputs, refuse_types
from tests.support.tiny import tiny_model

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


def test_token_types_that_a_model_reads_are_refused() -> None:
    """GPT-2 adds an embedding for type 0 too; Llama reads none, and Gemma 3 marks images by 1."""
    batch = {"input_ids": IDS + 3, "token_type_ids": torch.zeros_like(IDS)}
    for family, strength in (("gpt2", 0.0), ("llama", 1.0)):
        with DensityLoss(tiny_model(family), strength=strength).watching(batch=batch):
            pass
    density = DensityLoss(tiny_model("gpt2"), exits=0.0)
    with (
        pytest.raises(InvalidInputError, match="found token_type_ids, which GPT2"),
        density.watching(batch=batch),
    ):
        pass
    images = transformers.Gemma3ForConditionalGeneration.__new__(
        transformers.Gemma3ForConditionalGeneration
    )
    refuse_types(batch, images)
    with pytest.raises(InvalidInputError, match="found token_type_ids, which Gemma3"):
        refuse_types({"token_type_ids": torch.ones_like(IDS)}, images)


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_packed_documents_need_their_position_ids(options: dict[str, Any]) -> None:
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}]
    whole = DataCollatorWithFlattening(**options)(rows)
    assert batch_inputs(whole)["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    bare = DataCollatorWithFlattening(return_position_ids=False, **options)(rows)
    with pytest.raises(InvalidInputError, match=r"without position_ids.*return_position_ids=True"):
        batch_inputs(bare)


def test_a_completion_mask_says_which_tokens_count() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    found = batch_inputs({"input_ids": IDS, "completion_mask": mask})
    assert found["labels"].tolist() == [[-100, 1, 2], [-100, -100, 5]]
    assert "completion_mask" not in found
    said = torch.tensor([[1, 1, 0], [1, 1, 1]])
    both = batch_inputs({"input_ids": IDS, "completion_mask": mask, "assistant_masks": said})
    assert both["labels"].tolist() == [[-100, 1, -100], [-100, -100, 5]]
    alone = batch_inputs({"input_ids": IDS, "assistant_masks": said.bool()})
    assert alone["labels"].tolist() == [[0, 1, -100], [3, 4, 5]]
    kept = batch_inputs({"input_ids": IDS, "logits_to_keep": 1})
    assert kept["labels"].tolist() == [[-100, -100, 2], [-100, -100, 5]]
    assert IDS.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_labels_come_before_masks() -> None:
    others = {"completion_mask": torch.zeros_like(IDS), "logits_to_keep": 1}
    assert batch_inputs({"input_ids": IDS, "labels": IDS, **others})["labels"] is IDS


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(3), [[1, 1, 1]] * 2])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"completion_mask: found .*\(2, 3\)"):
        batch_inputs({"input_ids": IDS, "completion_mask": mask})


def test_prompts_and_completions_are_read_as_rows() -> None:
    batch = {
        "prompt_ids": torch.tensor([[0, 7], [5, 6]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 0], [3, 4, 2]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    found = batch_inputs(batch)
    assert found["input_ids"].tolist() == [[0, 7, 8, 9, 0], [5, 6, 3, 4, 2]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found["labels"].tolist() == [[-100, -100, 8, 9, -100], [-100, -100, 3, 4, 2]]
    tools = batch_inputs({**batch, "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])})
    assert tools["attention_mask"].tolist() == found["attention_mask"].tolist()
    assert tools["labels"][1].tolist() == [-100, -100, 3, -100, 2]
    del batch["prompt_mask"]
    with pytest.raises(InvalidInputError, match=r"found a mapping with keys .*'prompt_ids'"):
        batch_inputs(batch)
