"""How sure an exit is."""

from __future__ import annotations

import pytest
import torch

from softtrace.decoding.confidence import surest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_probability_of_the_most_likely_token(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 7, dtype=dtype)
    exact = logits.double().softmax(-1).amax(-1)
    error = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert torch.allclose(surest(logits).double(), exact, rtol=4 * error, atol=0)
