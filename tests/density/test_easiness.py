"""Scores of easiness, and the weights they give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace.density.easiness import EASINESS, easiness, easy_weights
from softtrace.errors import InvalidInputError


def example() -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 3 * logits, torch.tensor([[1, 0, -100], [4, -100, 2]])


def test_scores_by_hand() -> None:
    logits, targets = example()
    p = (logits.exp() / logits.exp().sum(-1, keepdim=True)).tolist()
    for row in range(2):
        for token in range(3):
            mass = sorted(p[row][token])
            target = int(targets[row, token])
            entropy = -sum(x * math.log(x) for x in mass)
            expected = {
                "entropy": entropy,
                "loss": -math.log(p[row][token][target]) if target >= 0 else entropy,
                "margin": math.log(mass[-2]) - math.log(mass[-1]),
            }
            assert expected.keys() == EASINESS.keys()
            for name, value in expected.items():
                score = easiness(name)(logits, targets)[row, token].item()
                assert score == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", sorted(EASINESS))
def test_certain_predictions_are_easier(name: str) -> None:
    logits, _ = example()
    logits[0] *= 4
    targets = logits.argmax(-1)
    scores = easiness(name)(logits, targets)
    assert (scores[0] < easiness(name)(logits / 4, targets)[0]).all()
    assert scores.dtype == torch.float64
    assert easiness(name)(logits.bfloat16(), targets).dtype == torch.float32


def test_a_callable_is_taken_as_it_is_and_unknown_names_are_refused() -> None:
    def score(logits: Tensor, targets: Tensor) -> Tensor:
        return logits[..., 0]

    assert easiness(score) is score
    with pytest.raises(
        InvalidInputError, match=r"found 'entropie', allowed are 'entropy', 'loss', 'margin' or a"
    ):
        easiness("entropie")


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    quantile=st.floats(0.01, 0.99),
    width=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_weights_equal_a_literal_step(seed: int, quantile: float, width: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    counted = torch.rand(3, 7, generator=generator) < 0.7
    counted[0, 0] = True
    weights = easy_weights(scores, counted, quantile, width)
    inside = sorted(scores[counted].tolist())
    count = max(1, min(len(inside), round(quantile * len(inside))))
    bound = inside[count - 1]
    mean = sum(inside) / len(inside)
    spread = width * math.sqrt(sum((value - mean) ** 2 for value in inside) / len(inside))
    for where, weight in zip(
        counted.flatten().tolist(),
        zip(scores.flatten().tolist(), weights.flatten().tolist(), strict=True),
        strict=True,
    ):
        score, found = weight
        if not where:
            assert found == 0
        elif spread == 0:
            assert found == (score <= bound)
        else:
            exponent = min((score - bound) / spread, 700)
            expected = 1 / (1 + math.exp(exponent))
            expected = expected if expected >= 0.02 else 0.0  # not worth a look
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    if width == 0:
        assert weights.sum() == count


def test_edges_of_the_weights() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    counted = torch.tensor([[True, True, True, False]])
    assert easy_weights(scores, counted, 1.0, 0.1).tolist() == [[1, 1, 1, 0]]
    assert easy_weights(scores, counted, 0.34, 0.0).tolist() == [[1, 0, 0, 0]]
    assert easy_weights(scores, counted, 1e-6, 0.0).tolist() == [[1, 0, 0, 0]]  # at least one
    assert easy_weights(scores, counted, 0.99, 0.0).tolist() == [[1, 1, 1, 0]]
    nothing = torch.zeros_like(counted)
    assert easy_weights(scores, nothing, 0.5, 0.1).tolist() == [[0, 0, 0, 0]]
    alike = torch.ones(1, 4)
    assert easy_weights(alike, counted, 0.5, 0.1).tolist() == [[1, 1, 1, 0]]
    assert not easy_weights(scores, counted, 0.5, 0.1).requires_grad
    assert easy_weights(scores.double(), counted, 0.5, 0.1).dtype == torch.float64


def test_a_share_of_a_number_of_tokens_is_taken_in_float64() -> None:
    scores = torch.arange(45.0)[None]  # 0.7 * 45 is just below 31.5, which float32 makes it
    weights = easy_weights(scores, torch.ones_like(scores, dtype=torch.bool), 0.7, 0.0)
    assert weights.sum() == round(0.7 * 45) == 31
