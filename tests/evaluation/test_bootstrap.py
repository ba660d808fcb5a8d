"""Bootstrap: against resamples written out token by token, and against what intervals promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softtrace.errors import InvalidInputError
from softtrace.evaluation import bootstrap
from softtrace.evaluation.bootstrap import (
    Difference,
    Median,
    RankCorrelation,
    Ratio,
    Stack,
    draw_counts,
    intervals,
    mean,
)

Literal = Callable[[np.ndarray, np.ndarray], float]


def drawn(sequences: int, tokens: int, seed: int, levels: int = 6) -> tuple[Tensor, Tensor]:
    """Two ``[N, M]`` of few different numbers, so that there are ties."""
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, levels, (2, sequences, tokens))
    return torch.tensor(x / 4), torch.tensor((y + x) / 8)


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1, ties at their mean, straight from the definition."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    first, second = ranks(x), ranks(y)
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def written_out(values: Tensor, counts: Tensor) -> np.ndarray:
    """All tokens of a resample, each sequence as often as it was drawn."""
    return np.repeat(values.numpy(), counts.numpy().astype(int), axis=0).ravel()


STATISTICS: dict[str, tuple[Callable[[Tensor, Tensor], bootstrap.Statistic], Literal]] = {
    "mean": (lambda x, y: mean(x), lambda x, y: float(x.mean())),
    "median": (
        lambda x, y: Median(x),
        lambda x, y: float(np.sort(x)[(len(x) - 1) // 2]),
    ),
    "rank correlation": (RankCorrelation, spearman),
    "difference": (
        lambda x, y: Difference(mean(y), Median(x)),
        lambda x, y: float(y.mean() - np.sort(x)[(len(x) - 1) // 2]),
    ),
}


@pytest.mark.parametrize("name", sorted(STATISTICS))
@settings(max_examples=25)
@given(sequences=st.integers(2, 6), tokens=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_counts_give_what_tokens_written_out_give(
    name: str, sequences: int, tokens: int, seed: int
) -> None:
    make, literal = STATISTICS[name]
    x, y = drawn(sequences, tokens, seed)
    counts = draw_counts(sequences, 8, seed)
    expected = [literal(written_out(x, row), written_out(y, row)) for row in counts]
    np.testing.assert_allclose(make(x, y)(counts).numpy(), expected, atol=1e-9)


@settings(max_examples=25)
@given(sequences=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_ratio_adds_up_before_it_divides(sequences: int, seed: int) -> None:
    above, below = drawn(sequences, 3, seed)
    below = below.sum(1, keepdim=True) + 1
    counts = draw_counts(sequences, 8, seed)
    found = Ratio(above, below)(counts)
    for row, values in zip(counts, found, strict=True):
        picked = np.repeat(np.arange(sequences), row.numpy().astype(int))
        expected = above.numpy()[picked].sum(0) / below.numpy()[picked].sum(0)
        np.testing.assert_allclose(values.numpy(), expected)


def test_interval_equals_a_slow_one() -> None:
    x, y = drawn(9, 4, seed=3)
    found = intervals({"rho": RankCorrelation(x, y), "median": Median(y)}, 300, seed=5)
    generator = torch.Generator().manual_seed(5)
    picks = torch.randint(9, (300, 9), generator=generator)
    for name, literal in (("rho", spearman), ("median", lambda _, y: np.sort(y)[17])):
        assert float(found[name].value) == pytest.approx(
            literal(*(v.numpy().ravel() for v in (x, y)))
        )
        slow = [literal(x[pick].numpy().ravel(), y[pick].numpy().ravel()) for pick in picks]
        low, high = np.quantile(slow, [0.025, 0.975])
        assert float(found[name].low) == pytest.approx(low)
        assert float(found[name].high) == pytest.approx(high)


def test_portions_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = drawn(7, 5, seed=1)
    statistics = {"rho": RankCorrelation(x, y), "stack": Stack([mean(x), mean(y)])}
    whole = intervals(statistics, 50, seed=0)
    monkeypatch.setattr(bootstrap, "_PORTION", 1)
    parts = intervals(statistics, 50, seed=0)
    assert {k: v.as_json() for k, v in whole.items()} == {k: v.as_json() for k, v in parts.items()}


def correlated_tokens(generator: torch.Generator, sequences: int, tokens: int) -> Tensor:
    """Mean 0; tokens of a sequence have most of their spread in common."""
    common = torch.randn(sequences, 1, generator=generator)
    return common + 0.3 * torch.randn(sequences, tokens, generator=generator)


def coverage(make: Callable[[Tensor], Tensor], repeats: int = 200) -> float:
    """How often the interval of the mean of tokens holds the true one, 0."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for repeat in range(repeats):
        values = make(correlated_tokens(generator, 40, 8))
        found = intervals({"mean": mean(values)}, 400, seed=repeat)["mean"]
        hits += bool(found.low <= 0 <= found.high)
    return hits / repeats


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # 95 % less what percentile intervals of 40 units lack; a binomial's spread of 200 is 1.5 %
    assert 0.90 <= coverage(lambda values: values) <= 0.98


def test_tokens_as_units_would_be_too_sure() -> None:
    assert coverage(lambda values: values.reshape(-1, 1)) < 0.7


def test_seeds_reproduce() -> None:
    x, _ = drawn(8, 6, seed=2)
    first, same, other = (intervals({"a": mean(x)}, 100, seed)["a"].as_json() for seed in (1, 1, 2))
    assert first == same != other
    assert first["value"] == other["value"]


def test_every_resample_draws_as_many_sequences_as_there_are() -> None:
    counts = draw_counts(5, 1000, seed=0)
    assert bool((counts.sum(1) == 5).all())
    np.testing.assert_allclose(counts.mean(0), 1.0, atol=0.12)


def test_a_statistic_less_itself_is_exactly_zero() -> None:
    x, y = drawn(6, 5, seed=4)
    for make, _ in STATISTICS.values():
        found = intervals({"a": Difference(make(x, y), make(x.clone(), y.clone()))}, 50, seed=0)[
            "a"
        ]
        assert found.as_json() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    before = 5 * torch.randn(30, 1, generator=generator).expand(30, 4)
    after = before + 1 + 0.1 * torch.randn(30, 4, generator=generator)
    found = intervals({"change": Difference(mean(after), mean(before)), "one": mean(after)}, 400, 0)
    assert float(found["change"].high - found["change"].low) < 0.1
    assert float(found["one"].high - found["one"].low) > 2


def test_resamples_that_do_not_define_a_statistic_are_left_out() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])  # the first sequence alone has no ranks
    found = intervals({"rho": RankCorrelation(x, x)}, 100, seed=0)["rho"]
    assert found.as_json() == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    never = intervals({"rho": RankCorrelation(x[:1].repeat(2, 1), x)}, 100, seed=0)["rho"]
    assert np.isnan([float(never.value), float(never.low), float(never.high)]).all()


def test_refusals() -> None:
    one = mean(torch.ones(1, 3))
    with pytest.raises(InvalidInputError, match=r"sequences: found 1, .* needs at least 2"):
        intervals({"a": one}, 10, 0)
    with pytest.raises(InvalidInputError, match="resamples: found 0, allowed are integers from 1"):
        intervals({"a": mean(torch.ones(3, 3))}, 0, 0)
    with pytest.raises(InvalidInputError, match="found 1 and 3 sequences"):
        Difference(mean(torch.ones(3, 3)), one)
    with pytest.raises(InvalidInputError, match=r"found \[1, 3\] sequences"):
        intervals({"a": one, "b": mean(torch.ones(3, 3))}, 10, 0)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_tokens_that_do_not_take_part_are_not_there(seed: int, share: float) -> None:
    x, _ = drawn(5, 4, seed)
    there = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) < share
    counts = draw_counts(5, 30, seed)
    statistics = Median(x.masked_fill(~there, torch.nan)), mean(x, there)
    medians, means = (statistic(counts).numpy() for statistic in statistics)
    for count, median, average in zip(counts.long().tolist(), medians, means, strict=True):
        tokens = [
            value
            for row, times in enumerate(count)
            for value in x[row][there[row]].tolist() * times
        ]
        if tokens:
            assert median == sorted(tokens)[(len(tokens) - 1) // 2]
            assert average == pytest.approx(np.mean(tokens))
        else:
            assert np.isnan(median)
            assert np.isnan(average)


def test_one_token_of_every_sequence_is_enough() -> None:
    x, y = drawn(6, 4, 3)
    found = intervals({"rho": RankCorrelation(x[:, :1], y[:, 1:2])}, 20, seed=1)
    wanted = intervals({"rho": RankCorrelation(x[:, :1].clone(), y[:, 1:2].clone())}, 20, seed=1)
    assert torch.equal(found["rho"].value, wanted["rho"].value)
