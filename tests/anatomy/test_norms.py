"""The form of a norm is found by running it, whatever activations look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from softtrace.anatomy.norms import LinearNorm, linear_norm
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


def test_the_scale_of_a_token_is_finite_whatever_its_size() -> None:
    """Of a token whose numbers are all the same a LayerNorm's input is nothing."""
    module = nn.LayerNorm(4)
    found = LinearNorm(module, centred=True, weight="weight", offset=0.0)
    full = torch.tensor([[3.0, 3, 3, 3], [1, -1, 1, -1]]) * torch.tensor([[[1.0]], [[1e-25]]])
    normed = torch.tensor([[0.0, 0, 0, 0], [1, -1, 1, -1]])
    scale = found.scale(full, normed.expand(2, 2, 4))
    torch.testing.assert_close(scale[..., 0], torch.tensor([[0.0, 1], [0, 1e25]]))
