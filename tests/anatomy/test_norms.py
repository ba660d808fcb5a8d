"""The form of a norm is found by running it, whatever activations look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from softtrace.anatomy.norms import linear_norm
from softtrace.anatomy.tolerances import tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [1.0, 1000.0])
@pytest.mark.parametrize(
    ("norm", "centred", "offset"),
    [(LlamaRMSNorm, False, 0.0), (Gemma3RMSNorm, False, 1.0), (nn.LayerNorm, True, 0.0)],
)
def test_the_form_is_found_beside_a_massive_activation(
    norm: Callable[[int], nn.Module],
    centred: bool,
    offset: float,
    largest: float,
    dtype: torch.dtype,
) -> None:
    """As Gemma 3 270M has one before a norm of its twelfth layer: 1 + w was taken for w there."""
    module = norm(64).to(dtype)
    sample = torch.randn(12, 64) + 0.2
    sample[:, 7] *= largest
    found = linear_norm(module, sample.to(dtype), tolerance(dtype))
    assert (found.centred, found.weight, found.offset) == (centred, "weight", offset)
