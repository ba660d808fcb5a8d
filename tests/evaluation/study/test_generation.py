"""Densities along a model's own text: against the curves of what it wrote."""

from __future__ import annotations

import pytest
import torch

import softtrace
from softtrace.evaluation.study.generation import (
    BINS,
    WRITERS,
    GenerationReadings,
    bins_of,
    read_generation,
)
from softtrace.evaluation.study.writing import write_on
from tests.support.tiny import tiny_model, tiny_prompt

BLOCKS = tiny_prompt(17, seed=3, batch=3)
PROMPT = 8


def read(batch_size: int = 3) -> GenerationReadings:
    return read_generation(
        tiny_model("llama"), BLOCKS, batch_size=batch_size, seed=0, attention="recomputed",
        progress=lambda count: None,
    )  # fmt: skip


def test_everyone_writes_after_the_same_prompts_and_is_measured_by_curves() -> None:
    model, found = tiny_model("llama"), read()
    assert tuple(found) == WRITERS
    assert torch.equal(found["text"].ids, BLOCKS)
    assert torch.equal(found["greedy"].ids[:, PROMPT:], write_on(model, BLOCKS[:, :PROMPT], 9))
    for writing in found.values():
        assert torch.equal(writing.ids[:, :PROMPT], BLOCKS[:, :PROMPT])
        curve = softtrace.density_curve(model, writing.ids, attention="recomputed")
        explained = slice(PROMPT - 1, 16)  # the places before the nine new tokens
        torch.testing.assert_close(writing.tokens.area, curve.area()[:, explained])
        torch.testing.assert_close(writing.tokens.size, curve.size_at()[:, explained])
        torch.testing.assert_close(writing.tokens.entropy, curve.entropy[:, explained])
        with torch.no_grad():
            logs = model(writing.ids).logits.log_softmax(-1)
        losses = -logs[:, PROMPT - 1 : 16].gather(-1, writing.ids[:, PROMPT:, None])[..., 0]
        torch.testing.assert_close(writing.tokens.surprisal, losses)
    first = [writing.tokens.entropy[:, 0] for writing in found.values()]
    assert torch.equal(first[0], first[1])  # predicted from the prompt alone
    assert torch.equal(first[0], first[2])
    assert not torch.equal(found["greedy"].ids, found["sampled"].ids)


def test_batches_change_nothing() -> None:
    for one, other in zip(read(3).values(), read(2).values(), strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.tokens.area, other.tokens.area)


@pytest.mark.parametrize("new", [8, 9, 64, 100])
def test_bins_are_as_equal_as_can_be_and_hold_every_new_token_once(new: int) -> None:
    bins = bins_of(new)
    assert len(bins) == BINS
    assert [n for first, last in bins for n in range(first, last + 1)] == list(range(1, new + 1))
    widths = [last - first + 1 for first, last in bins]
    assert max(widths) - min(widths) <= 1
