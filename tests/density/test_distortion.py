"""Distances of two predictions against literal sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace.density.distortion import (
    NUCLEUS_SHARES,
    divergence,
    entropy,
    log_probabilities,
    nucleus_recovered,
    total_variation,
)


def two_predictions(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    full, noise = torch.randn(2, 3, 4, 11, generator=generator, dtype=torch.float64)
    return scale * full, scale * full + noise


def probabilities(logits: Tensor) -> np.ndarray:
    raised = np.exp(logits.double().numpy())
    return np.asarray(raised / raised.sum(-1, keepdims=True))


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 20))
def test_distances_equal_literal_sums(seed: int, scale: float) -> None:
    full, masked = two_predictions(seed, scale)
    p, q = probabilities(full), probabilities(masked)
    variation = total_variation(full, masked)
    np.testing.assert_allclose(variation, np.abs(p - q).sum(-1) / 2, atol=1e-12)
    np.testing.assert_allclose(
        divergence(full, masked), (p * np.log(p / q)).sum(-1), rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(entropy(full), -(p * np.log(p)).sum(-1), rtol=1e-6, atol=1e-12)
    assert ((variation >= 0) & (variation <= 1)).all()
    assert (divergence(full, masked) >= -1e-12).all()
    # Pinsker: TV <= sqrt(KL / 2)
    assert (variation <= (divergence(full, masked) / 2).clamp_min(0).sqrt() + 1e-9).all()


def test_rounding_gives_total_variation_no_gradient() -> None:
    full, _ = two_predictions(3)
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        same = full.to(dtype)
        noise = 1 + 4 * torch.finfo(dtype).eps * torch.randn_like(same)
        masked = (same * noise).requires_grad_()
        variation = total_variation(same, masked)
        assert (variation > 0).any()
        assert torch.autograd.grad(variation.sum(), masked)[0].abs().max() == 0
        apart = (same + 1e-3 * torch.randn_like(same)).requires_grad_()
        assert torch.autograd.grad(total_variation(same, apart).sum(), apart)[0].abs().max() > 1e-3


def test_sums_in_place_leave_the_predictions_alone() -> None:
    """Without gradients nothing of the vocabulary's size is copied; the sums are the same."""
    generator = torch.Generator().manual_seed(0)
    full, masked = torch.randn(2, 3, 5, 3_000, generator=generator)
    before = full.clone(), masked.clone()
    found = total_variation(full, masked)
    assert torch.equal(full, before[0])
    assert torch.equal(masked, before[1])
    expected = np.abs(probabilities(full) - probabilities(masked)).sum(-1) / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    torch.testing.assert_close(total_variation(full, masked.requires_grad_()).detach(), found)
    assert total_variation(full[:, :0], masked[:, :0].detach()).shape == (3, 0)


def test_extremes() -> None:
    certain, opposite = torch.tensor([50.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 50.0])
    assert total_variation(certain, opposite).item() == pytest.approx(1.0)
    assert divergence(certain, opposite).item() == pytest.approx(50.0)
    assert total_variation(certain, certain).item() == divergence(certain, certain).item() == 0
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    assert entropy(certain).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_are_compared_in_float32() -> None:
    full, masked = two_predictions(0)
    half = full.bfloat16(), masked.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total_variation(*half), divergence(*half), entropy(half[0])
        assert log_probabilities(half[0]).dtype == torch.float32
    exact = (
        total_variation(half[0].double(), half[1].double()),
        divergence(half[0].double(), half[1].double()),
        entropy(half[0].double()),
    )
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_distances() -> None:
    full, masked = two_predictions(1)
    masked.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: divergence(full, q), masked)
    assert torch.autograd.gradcheck(lambda q: total_variation(full, q), masked)


def top_list(probability: np.ndarray, share: float) -> list[int]:
    """Tokens by falling probability until their mass reaches ``share``."""
    mass, tokens = 0.0, []
    for token in np.argsort(-probability, kind="stable"):
        tokens.append(int(token))
        mass += probability[token]
        if mass >= share:
            break
    return tokens


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), noise=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_recovered_nuclei_equal_literal_lists(seed: int, noise: float) -> None:
    full, other = two_predictions(seed)
    masked = full + noise * (other - full)
    found = nucleus_recovered(full, masked)
    assert found.shape == (3, 4, len(NUCLEUS_SHARES))
    p, q = probabilities(full), probabilities(masked)
    for row in np.ndindex(3, 4):
        for index, share in enumerate(NUCLEUS_SHARES):
            assert found[row][index] == (top_list(p[row], share) == top_list(q[row], share))
    if noise == 0:
        assert found.all()


def test_recovered_nuclei_by_hand() -> None:
    full = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    swapped_tail = torch.tensor([0.5, 0.3, 0.05, 0.15]).log()
    flatter = torch.tensor([0.35, 0.34, 0.2, 0.11]).log()
    shares = (0.4, 0.7, 0.9)
    assert nucleus_recovered(full, swapped_tail, shares).tolist() == [True, True, False]
    assert nucleus_recovered(full, flatter, shares).tolist() == [False, False, False]
    assert nucleus_recovered(full, flatter, (0.3,)).tolist() == [True]
