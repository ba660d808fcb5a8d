"""Hard, straight, soft and early-phase masks, edge by edge."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EdgeImportance, LayerEdges
from softtrace.graph.masks import hard_masks, soft_masks
from softtrace.graph.sizes import edge_counts, soft_size
from tests.support.literal import edges_of, every_edge, made_up_importance, value_of

PADDED = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def importance_with_padding(seed: int = 0) -> EdgeImportance:
    return made_up_importance(seed, valid=PADDED, windows=(None, 2))


@pytest.mark.parametrize("threshold", [0.3, torch.tensor([0.02, 0.2, 0.6])])
def test_every_kind_of_mask_edge_by_edge(threshold: float | Tensor) -> None:
    importance, temperature = importance_with_padding(), 0.7
    hard = hard_masks(importance, threshold)
    soft = soft_masks(importance, threshold, temperature)
    kept = 0
    layers, batch, heads, length = importance.shape
    for row in range(batch):
        tau = float(threshold[row]) if isinstance(threshold, Tensor) else threshold
        existing = edges_of(importance, row)
        for edge in every_edge(layers, heads, length):
            score = existing.get(edge)
            wanted = score is not None and score >= tau
            assert value_of(hard, row, edge) == wanted
            kept += wanted
            if score is None:
                assert value_of(soft, row, edge) == 0
            else:
                expected = 1 / (1 + math.exp(-(math.log(score) - math.log(tau)) / temperature))
                assert value_of(soft, row, edge) == pytest.approx(expected, rel=1e-6)
    assert kept > 20
    assert hard[0].mlp.dtype == torch.bool
    assert soft[0].mlp.dtype == torch.float64


def test_an_existing_edge_of_importance_zero_is_kept_at_threshold_zero_only() -> None:
    importance = importance_with_padding()
    importance.layers[0].attention[:] = 0
    kept = hard_masks(importance, 0.0)[0].attention
    assert torch.equal(kept, importance.visible[0][:, None].expand_as(kept))
    assert not hard_masks(importance, 1e-30)[0].attention.any()
    assert (soft_masks(importance, 0.1, 0.5)[0].attention < 1e-9).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), tau=st.floats(0.001, 0.9))
def test_soft_masks_become_hard_as_the_temperature_falls(seed: int, tau: float) -> None:
    importance = importance_with_padding(seed)
    scores = torch.cat([part.flatten() for layer in importance.layers for part in layer])
    near = (scores.clamp_min(1e-300).log() - math.log(tau)).abs().min().item()
    temperature = max(near, 1e-12) / 50
    for soft, hard in zip(
        soft_masks(importance, tau, temperature), hard_masks(importance, tau), strict=True
    ):
        for one, other in zip(soft, hard, strict=True):
            torch.testing.assert_close(one, other.double(), atol=1e-12, rtol=0)
    softer = soft_masks(importance, tau, 1e6)
    for layer, exists in zip(softer, importance.existing(), strict=True):
        for one, there in zip(layer, exists, strict=True):
            torch.testing.assert_close(one, there.double() / 2, atol=1e-3, rtol=0)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), taus=st.lists(st.floats(1e-4, 0.99), min_size=2, max_size=5))
def test_masks_and_sizes_shrink_as_the_threshold_rises(seed: int, taus: list[float]) -> None:
    importance = importance_with_padding(seed)
    ordered = [hard_masks(importance, tau) for tau in sorted(taus)]
    for bigger, smaller in itertools.pairwise(ordered):
        for one, other in zip(bigger, smaller, strict=True):
            assert all((a >= b).all() for a, b in zip(one, other, strict=True))
        assert (edge_counts(bigger).sum((2, 3)) >= edge_counts(smaller).sum((2, 3))).all()


def test_hard_masks_let_no_gradient_through_and_soft_masks_do() -> None:
    importance = importance_with_padding()
    for layer in importance.layers:
        for part in layer:
            part.requires_grad_()
    assert not any(p.requires_grad for layer in hard_masks(importance, 0.1) for p in layer)
    soft = soft_masks(importance, 0.1, 0.5)
    sum((part.sum() for layer in soft for part in layer), torch.zeros(())).backward()
    for layer, exists in zip(importance.layers, importance.existing(), strict=True):
        for part, there in zip(layer, exists, strict=True):
            assert part.grad is not None
            assert part.grad.isfinite().all()
            assert torch.equal(part.grad != 0, there)


def small() -> tuple[EdgeImportance, list[Tensor]]:
    importance = made_up_importance(
        1, valid=torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool), layers=2
    )
    parts = [part.clone().requires_grad_() for layer in importance.layers for part in layer]
    return importance, parts


def rebuilt(importance: EdgeImportance, parts: tuple[Tensor, ...]) -> EdgeImportance:
    layers = tuple(LayerEdges(*parts[4 * i : 4 * i + 4]) for i in range(len(parts) // 4))
    return EdgeImportance(layers, importance.visible, importance.valid)


def test_gradcheck_of_soft_masks() -> None:
    importance, parts = small()
    threshold = torch.tensor([0.1, 0.3], dtype=torch.float64)

    def masks(*values: Tensor) -> tuple[Tensor, ...]:
        # Absent edges stay 0 when gradcheck moves them: their gradient must be 0 too.
        soft = soft_masks(rebuilt(importance, values), threshold, 0.5)
        return tuple(part for layer in soft for part in layer)

    # Importances near 0 have a gradient of 1 / importance: the step must be smaller than they are.
    assert torch.autograd.gradcheck(masks, parts, eps=1e-9, atol=1e-4)


def test_gradcheck_of_soft_size() -> None:
    importance, parts = small()
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def size(*values: Tensor) -> Tensor:
        rich = rebuilt(importance, values)
        return soft_size(rich, soft_masks(rich, 0.9, 0.5), weights)

    assert size(*parts).requires_grad
    assert torch.autograd.gradcheck(size, parts, eps=1e-9, atol=1e-4)


def test_soft_size_of_hard_masks_is_the_size_of_the_trace() -> None:
    importance = importance_with_padding(4)
    masks = hard_masks(importance, 0.2)
    counts = edge_counts(hard_masks(importance, 0.2)).sum((2, 3)).double()
    everything = edge_counts(importance.existing()).sum((2, 3)).double()
    size = soft_size(importance, masks)
    torch.testing.assert_close(size[PADDED], counts[PADDED] / everything[PADDED])
    assert (size[~PADDED] == 0).all()
    weights = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(soft_size(importance, masks, weights), (size * weights).sum())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(InvalidInputError, match="temperature: found"):
        soft_masks(importance_with_padding(), 0.1, temperature)


def test_soft_masks_of_edges_of_importance_zero_have_a_gradient_of_zero() -> None:
    importance = importance_with_padding()
    attention = importance.layers[0].attention
    attention.zero_().requires_grad_()
    (gradient,) = torch.autograd.grad(
        soft_masks(importance, 0.1, 0.5)[0].attention.sum(), attention
    )
    assert not gradient.any()
