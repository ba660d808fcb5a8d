"""Distances a few at a time: the same numbers and gradients, and no copies that are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace.density import chunks
from softtrace.density.chunks import Distance, distances
from softtrace.density.distortion import DISTANCES


def predictions(count: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, vocabulary, generator=generator).to(dtype) for _ in range(2)]


@settings(max_examples=30)
@given(count=st.integers(1, 9), rows=st.integers(1, 10), name=st.sampled_from(sorted(DISTANCES)))
def test_chunks_give_distances_and_gradients_of_all_at_once(
    count: int, rows: int, name: str
) -> None:
    full, masked = predictions(count, 7)
    weights = torch.arange(1.0, count + 1, dtype=torch.float64)
    found = []
    for size in (rows, count):
        own = masked.clone().requires_grad_()
        values = distances(DISTANCES[name], full, own, size)
        (weights * values).sum().backward()
        found += [values.detach(), own.grad]
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[3], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_gradients_are_right(distance: Distance) -> None:
    full, masked = predictions(5, 4)
    masked.requires_grad_()
    assert torch.autograd.gradcheck(lambda own: distances(distance, full, own, 2), masked)


def test_what_is_kept_is_one_gradient_in_the_dtype_of_the_logits() -> None:
    full, masked = predictions(8, 5, torch.bfloat16)
    masked.requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values = distances(DISTANCES["kl"], full, masked, 2)
    assert values.dtype == torch.float32
    # The chunks keep what they need for as long as each takes; one thing is kept of all.
    assert [each.shape for each in kept if len(each) == 8] == [(8, 5)]
    assert kept[-1].dtype == torch.bfloat16


def test_how_many_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def distance(full: Tensor, masked: Tensor) -> Tensor:
        seen.append((len(full), len(masked)))
        return (full - masked).square().sum(-1)

    full, masked = predictions(5, 4)
    for at_once in (8, 20, 1):  # logits, of one prediction at least
        monkeypatch.setattr(chunks, "AT_ONCE", at_once)
        distances(distance, full, masked)
    assert seen == [(2, 2), (2, 2), (1, 1), (5, 5), *[(1, 1)] * 5]


def test_nothing_is_differentiated_where_nothing_learns() -> None:
    full, masked = predictions(4, 4)
    masked.requires_grad_()
    with torch.no_grad():
        assert not distances(DISTANCES["tv"], full, masked, 1).requires_grad
    assert not distances(DISTANCES["tv"], full, masked.detach(), 1).requires_grad
