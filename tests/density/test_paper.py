"""The paper's quantities against a literal, slow reading of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from softtrace.density.curve import by_quartile
from softtrace.density.paper import (
    COMMON_SIZES,
    NUCLEUS_CANDIDATES,
    PAPER_SIZES,
    auc,
    by_depth_group,
    depth_groups,
    edge_count,
    first_size,
    nucleus_frequency,
    on_common_sizes,
    shared_nucleus,
)
from softtrace.graph.trace import trace_length


def top_list(logits: torch.Tensor, p: float) -> list[int]:
    """Tokens by falling probability until their mass reaches p, one by one."""
    likely = logits.double().softmax(-1).tolist()
    tokens: list[int] = []
    mass = 0.0
    for token in sorted(range(len(likely)), key=lambda each: -likely[each]):
        tokens.append(token)
        mass += likely[token]
        if mass >= p:
            break
    return tokens


def test_the_smallest_traces_can_be_empty_and_the_sizes_end_with_the_full_graph() -> None:
    assert [edge_count(s, 1000) for s in (1e-5, 1e-3, 1.4e-3, 0.8, 1.0)] == [0, 1, 1, 800, 1000]
    assert trace_length(1.4e-3, 1000) == 2  # ours
    assert len(PAPER_SIZES) == 27
    assert list(PAPER_SIZES) == sorted(PAPER_SIZES)
    assert PAPER_SIZES[-1] == 1.0


def test_auc_adds_up_trapezoids_and_takes_an_empty_trace_for_1e_minus_8() -> None:
    sizes, heights = [0.0, 1e-5, 1e-3, 0.5, 1.0], [1.0, 0.9, 0.4, 0.1, 0.0]
    logs = [math.log10(min(max(s, 1e-8), 1.0)) for s in sizes]
    expected = sum(
        (logs[at + 1] - logs[at]) * (heights[at + 1] + heights[at]) / 2 for at in range(4)
    )
    found = auc(torch.tensor([sizes] * 2), torch.tensor([heights, [1.0] * 5]))
    assert found.tolist() == pytest.approx([expected, 8.0], rel=1e-6)
    assert float(auc(torch.tensor([1e-5, 1.0]), torch.ones(2))) == pytest.approx(5.0, rel=1e-6)


def test_the_shared_nucleus_is_the_largest_p_with_equal_lists() -> None:
    generator = torch.Generator().manual_seed(0)
    full = 2 * torch.randn(40, 30, generator=generator)
    near = full + 0.15 * torch.randn(40, 30, generator=generator)
    found = shared_nucleus(full, near).tolist()
    for row, value in enumerate(found):
        equal = [
            p for p in NUCLEUS_CANDIDATES
            if top_list(full[row], p / 100) == top_list(near[row], p / 100)
        ]  # fmt: skip
        assert value == max(equal, default=0)
    assert len(set(found)) > 4
    assert shared_nucleus(full, full).tolist() == [99] * 40


def test_nu_of_k_says_less_than_equal_top_k_lists() -> None:
    """At 50 % one needs two tokens and the other one; from 80 % on both need as many."""
    full, masked = torch.tensor([0.45, 0.40, 0.15]).log(), torch.tensor([0.55, 0.30, 0.15]).log()
    assert top_list(full, 0.5) != top_list(masked, 0.5)
    assert int(shared_nucleus(full, masked)) == 99


def test_the_first_size_counts_even_where_a_larger_one_falls_back() -> None:
    sizes = torch.tensor([[1e-4, 1e-3, 1e-2, 1.0]])
    nucleus = torch.tensor([[0, 40, 10, 99]])
    found = [float(first_size(sizes, nucleus, k)[0]) for k in (1, 40, 60)]
    assert found == pytest.approx([1e-3, 1e-3, 1.0])
    assert first_size(sizes[:, :3], nucleus[:, :3], 60).isnan().all()


@pytest.mark.parametrize("layers", [1, 3, 4, 6, 30, 31, 32])
def test_depth_groups_are_array_splits(layers: int) -> None:
    expected = [
        group for group, part in enumerate(np.array_split(np.arange(layers), 4)) for _ in part
    ]
    assert depth_groups(layers).tolist() == expected
    counts = torch.arange(2 * layers * 4).reshape(2, layers, 4)
    summed = by_depth_group(counts)
    for group in range(4):
        rows = [layer for layer in range(layers) if expected[layer] == group]
        assert torch.equal(summed[:, group], counts[:, rows].sum(1))


def test_thirty_layers_are_split_otherwise_than_ours() -> None:
    assert depth_groups(30).bincount().tolist() == [8, 8, 7, 7]
    ours = by_quartile(torch.ones(1, 1, 30, 1))[0, 0, :, 0].tolist()
    assert ours == [8, 7, 8, 7]


def test_frequency_is_the_mean_of_the_first_five_listed_tokens_that_the_corpus_has() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.cat([s * torch.randn(20, 12, generator=generator) for s in (0.1, 1.5, 6.0)])
    counts = torch.tensor([0, 3, 50, 7, 0, 0, 21, 4, 9, 1, 0, 5])
    for row, value in zip(logits, nucleus_frequency(logits, counts).tolist(), strict=True):
        tokens = [token for token in top_list(row, 0.6)[:5] if counts[token]]
        expected = sum(int(counts[token]) for token in tokens) / 100 / len(tokens or [0])
        assert value == pytest.approx(expected) if tokens else math.isnan(value)


def test_curves_are_read_linearly_in_the_size_on_the_common_ones() -> None:
    sizes = torch.tensor([[0.0, 1e-3, 1.0], [1e-2, 0.5, 1.0]])
    values = torch.tensor([[1.0, 0.5, 0.0], [0.8, 0.4, 0.0]])
    found = on_common_sizes(sizes, values[..., None].expand(-1, -1, 2))
    assert found.shape == (2, 150, 2)
    for row in range(2):
        expected = np.interp(COMMON_SIZES, sizes[row].double(), values[row].double())
        np.testing.assert_allclose(found[row, :, 0], expected)
    assert (COMMON_SIZES[0], COMMON_SIZES[-1]) == pytest.approx((1e-5, 1.0))
