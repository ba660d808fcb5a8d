"""Linear layers that read few tokens on a processor: the same numbers by another product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.decoding import StaticDecoder, greedy
from softtrace.decoding.few_rows import MOST, fast_few_rows
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every usual product."""
    seen: list[int] = []
    own = nn.functional.linear

    def linear(read: Tensor, *args: Any) -> Tensor:
        seen.append(read.numel() // read.shape[-1])
        return own(read, *args)

    monkeypatch.setattr(nn.functional, "linear", linear)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_read_by_another_product(bias: bool, usual: list[int]) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    for shape in ((1, 1), (1, 3), (2, 2), (5,), (1, 6), (3, 4), (0, 2)):
        read = torch.randn(*shape, 24)
        for given in (read, read.transpose(0, -2).contiguous().transpose(0, -2)):
            wanted = layer(given)
            usual.clear()
            with fast_few_rows(layer):
                found = layer(given)
            torch.testing.assert_close(found, wanted)
            assert found.is_contiguous()
            count = given.numel() // 24
            assert usual == ([] if 1 <= count <= MOST else [count])


def test_what_is_more_than_a_linear_layer_runs_as_ever(usual: list[int]) -> None:
    class Own(nn.Linear):
        pass

    wrapped = nn.Linear(8, 8)
    wrapped.forward = lambda read: read  # type: ignore[method-assign]
    module = nn.ModuleList([Own(8, 8), nn.Linear(8, 8).double(), nn.Linear(8, 8).half(), wrapped])
    before = [vars(layer).get("forward") for layer in module]
    with fast_few_rows(module):
        assert [vars(layer).get("forward") for layer in module] == before
    plain = nn.Linear(8, 8)
    with pytest.raises(TypeError), fast_few_rows(plain):
        plain()
    assert "forward" not in vars(plain)


def test_decoding_by_steps_of_fixed_shapes_reads_so(usual: list[int]) -> None:
    model, row = tiny_model("llama", seed=2), tiny_prompt(9)
    wanted = greedy(model, row, 12, -1).tokens
    static = StaticDecoder(
        model, exit_layer=2, draft_tokens=3, capacity=32, backend=None, eos_token_id=-1
    )
    usual.clear()
    for write in (static.plain, static.speculate):
        assert torch.equal(write([row], 12)[0].tokens, wanted)
    assert {*usual} == {8}  # the prompts, but for their last tokens
