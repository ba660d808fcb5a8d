"""Checks on what users hand in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.errors import InvalidInputError, NonFiniteError, SofttraceError
from softtrace.graph.batch import (
    Batch,
    check_finite,
    check_length,
    chosen_positions,
    position_ids_of,
)

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def checked(ids: Any, mask: Any, vocabulary: int) -> Tensor:
    """[B, T] bool, True at the real tokens of a batch that passes all checks."""
    batch = Batch.of(ids, mask)
    batch.check_values(vocabulary)
    return batch.valid


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_good_batches_give_what_is_valid(dtype: torch.dtype) -> None:
    assert checked(IDS, None, 7).all()
    assert checked(IDS.int(), None, 7).shape == (2, 3)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    valid = checked(IDS, mask.to(dtype), 7)
    assert valid.dtype == torch.bool
    assert valid.tolist() == mask.bool().tolist()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, r"input_ids: found list, expected a tensor of shape \[B, T\]"),
        (IDS[0], None, r"input_ids: found \(3,\), expected .* pass one row as input_ids\[None\]"),
        ("a text", None, r"input_ids: found str, .* tokenizer\(text, return_tensors=\"pt\"\)"),
        (IDS[None], None, r"input_ids: found \(1, 2, 3\), expected"),
        (IDS.float(), None, "input_ids: found torch.float32, expected int64 or int32"),
        (IDS[:0], None, r"input_ids: found shape \(0, 3\), no token in it"),
        (IDS[:, :0], None, r"input_ids: found shape \(2, 0\), no token in it"),
        (IDS, None, "found ids from 1 to 6, allowed are 0 to 5 .*tokenizer"),
        (IDS - 2, None, "found ids from -1 to 4, allowed are 0 to 5"),
        (IDS - 1, IDS[:1], r"attention_mask: found shape \(1, 3\), expected .* \(2, 3\)"),
        (IDS - 1, [[1, 1, 1]], "attention_mask: found list, expected a tensor of the shape"),
        (IDS - 1, IDS, "attention_mask: found values other than 0 and 1"),
        (IDS - 1, torch.full((2, 3), -math.inf), "values other than 0 and 1"),
    ],
)
def test_malformed_batches_are_refused(ids: Any, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as raised:
        checked(ids, mask, 6)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, SofttraceError)


def test_sequences_longer_than_the_learned_positions_are_refused() -> None:
    check_length(10**6, None)
    check_length(64, 64)
    with pytest.raises(InvalidInputError, match=r"^data: found sequences of 65 .* at most 64, the"):
        check_length(65, 64, "data")


def test_positions_count_from_the_first_real_token() -> None:
    valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    expected = [[0, 1, 2, 3], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert position_ids_of(valid).tolist() == expected


def test_values_that_are_not_finite_are_counted_where_they_matter() -> None:
    values = torch.zeros(2, 3, 4)
    check_finite(values, "logits")
    values[0, 2, 1], values[1, 0, 0], values[1, 0, 3] = math.nan, math.inf, -math.inf
    with pytest.raises(NonFiniteError, match=r"logits: 3 of 24 values are NaN or infinite.*Lower"):
        check_finite(values, "logits")
    valid = torch.ones(2, 3, dtype=torch.bool)
    valid[1, 0] = False
    with pytest.raises(NonFiniteError, match="logits: 1 of 20"):
        check_finite(values, "logits", valid)
    valid[0, 2] = False
    check_finite(values, "logits", valid)


def test_padding_is_chosen_neither_by_number_nor_by_a_mask() -> None:
    valid = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    expected = [[False, False, True], [True, True, False]]
    assert chosen_positions([0, -1], valid).tolist() == expected
    assert torch.equal(chosen_positions(torch.ones(2, 3), valid), valid)


def test_token_0_is_a_target_as_any_other() -> None:
    batch = Batch.of(torch.tensor([[3, 0, 4, 5]]), labels=torch.tensor([[-100, 0, -100, 5]]))
    assert batch.targets.tolist() == [[0, -100, 5, -100]]
    assert batch.counted.tolist() == [[True, False, True, False]]
