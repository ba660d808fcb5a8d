"""What the bound on a cache lets through, and what lies beyond it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softtrace.anatomy.tolerances import cache_tolerance, typical_mismatch
from softtrace.model.wrappers import forward_parameters, with_cache
from tests.support.tiny import tiny_model, tiny_prompt

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_wrong_place_and_a_token_too_many_lie_beyond_the_bound(
    family: str, dtype: torch.dtype
) -> None:
    model, ids = tiny_model(family, dtype=dtype), tiny_prompt(8)

    @torch.no_grad()
    def continued(later: int = 0, more: int = 0) -> Tensor:
        into = with_cache(forward_parameters(model), DynamicCache())
        model(ids[:, : 5 + more], **into)
        places = torch.arange(5, 8)[None] + later
        logits: Tensor = model(ids[:, 5:], position_ids=places, **into).logits[0]
        return logits

    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[0, 5:]
    allowed = cache_tolerance(dtype)
    assert typical_mismatch(continued(), wanted) <= allowed / 4
    assert typical_mismatch(continued(later=1), wanted) > 2 * allowed
    assert typical_mismatch(continued(more=1), wanted) > 2 * allowed


def test_the_rounding_of_a_fine_tuned_model_is_let_through() -> None:
    assert cache_tolerance(torch.float32) > 2 * 1.7e-4  # see its docstring


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_may_be_off_in_half_precision_alone(dtype: torch.dtype) -> None:
    expected = torch.ones(3, 4, dtype=dtype)
    found = expected.clone()
    found[1, 2] = 3
    assert typical_mismatch(found, expected) == (0 if dtype.itemsize < 4 else 2)
