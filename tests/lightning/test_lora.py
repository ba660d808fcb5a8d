"""Adapters of ``softtrace fit``: what is saved is what was trained."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from softtrace.errors import InvalidInputError
from softtrace.lightning.lora import LoRA, merged
from tests.support.tiny import tiny_model, tiny_prompt

EMBEDDINGS = [["q_proj", "embed_tokens"], ["q_proj", "lm_head"]]


def adapted(targets: str | list[str], tied: bool) -> nn.Module:
    """A model with adapters that change what it says."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    with warnings.catch_warnings():  # PEFT's own, of tied embeddings
        warnings.simplefilter("ignore")
        found = LoRA(rank=4, targets=targets).wrap(model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return found


@pytest.mark.parametrize("targets", EMBEDDINGS)
def test_adapters_of_tied_embeddings_are_refused(targets: list[str]) -> None:
    """Both modules have one matrix: a merged adapter would change what it never changed."""
    with pytest.raises(InvalidInputError, match=f"{targets[1]}, .*embed_tokens and lm_head"):
        adapted(targets, tied=True)


@pytest.mark.parametrize(
    ("targets", "tied"), [("all-linear", True), *((each, False) for each in EMBEDDINGS)]
)
def test_a_merged_model_says_what_the_trained_one_says(
    targets: str | list[str], tied: bool
) -> None:
    ids, model = tiny_prompt(7), adapted(targets, tied)
    with torch.no_grad():
        wanted: Any = model(input_ids=ids).logits
        found: Any = merged(model)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
