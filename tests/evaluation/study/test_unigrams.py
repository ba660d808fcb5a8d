"""Unigrams: counts, divergence and ranks by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softtrace.data import encoding
from softtrace.data.documents import Document
from softtrace.errors import DataError, InvalidInputError
from softtrace.evaluation.study.unigrams import Unigrams, count_unigrams
from softtrace.metrics.functional import mid_ranks
from tests.evaluation.test_bootstrap import ranks
from tests.support.corpus import byte_tokenizer


def test_divergence_of_a_hand_made_prediction() -> None:
    corpus = Unigrams(torch.tensor([5, 2, 0, 1]), smoothing=1.0)  # 6/12, 3/12, 1/12, 2/12
    assert corpus.probabilities.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 12, 1 / 6])
    prediction = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1 / 2, 1 / 4, 1 / 12, 1 / 6]])
    found = corpus.read(prediction.double().log())
    expected = 0.25 * (math.log(1 / 2) + math.log(1) + math.log(3) + math.log(3 / 2))
    assert found[0, 0].item() == pytest.approx(expected)
    assert found[1, 0].item() == pytest.approx(0, abs=1e-12)
    assert corpus.uniform_divergence == pytest.approx(expected)
    terms = [share * math.log(share) for share in (1 / 2, 1 / 4, 1 / 12, 1 / 6)]
    assert corpus.entropy == pytest.approx(-sum(terms))


def test_ranks_are_those_of_tokens_that_occur() -> None:
    corpus = Unigrams(torch.tensor([4, 3, 2, 1, 0, 0]), smoothing=0.5)
    as_frequent = [4.0, 3.0, 2.0, 1.0]
    logits = torch.tensor([
        [*as_frequent, 9.0, -9.0],  # what does not occur does not count
        [*reversed(as_frequent), 0.0, 0.0],
        [1.0, 2.0, 4.0, 3.0, 0.0, 0.0],
        [7.0, 7.0, 7.0, 7.0, 1.0, 2.0],  # says nothing of their order
    ])  # fmt: skip
    assert corpus.read(logits)[:, 1].tolist() == pytest.approx([1, -1, -0.8, 0])
    constant = Unigrams(torch.tensor([2, 2, 0]), smoothing=1.0)
    assert math.isnan(constant.read(torch.tensor([[1.0, 2.0, 3.0]]))[0, 1])


@settings(max_examples=30)
@given(rows=st.integers(1, 4), size=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_mid_ranks_equal_their_definition(rows: int, size: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 5, (rows, size))
    found = mid_ranks(torch.tensor(values))
    np.testing.assert_array_equal(found.numpy(), np.stack([ranks(row) for row in values]))


@pytest.mark.parametrize(("characters", "calls"), [(1, [1, 1]), (4_000_000, [2])])
def test_counts_bytes_and_ends_of_documents(
    monkeypatch: pytest.MonkeyPatch, characters: int, calls: list[int]
) -> None:
    tokenizer, made = byte_tokenizer(), list[int]()
    encode = type(tokenizer).__call__

    def counted(self: Any, texts: list[str], **options: Any) -> Any:
        made.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    monkeypatch.setattr(encoding, "_CHARACTERS_PER_CALL", characters)
    corpus = count_unigrams([Document("a", "aab"), Document("b", "a")], tokenizer, 260)
    number = tokenizer.convert_tokens_to_ids
    assert int(corpus.counts[number("a")]) == 3
    assert int(corpus.counts[number("b")]) == 1
    assert int(corpus.counts[256]) == 2
    assert int(corpus.counts.sum()) == 6
    assert corpus.smoothing == 1.0
    assert made == calls  # documents that were in memory as lists of ids at once


def test_refusals() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="no document on the training side"):
        count_unigrams([], tokenizer, 257)
    with pytest.raises(InvalidInputError, match=r"found id .*, the model predicts 20 tokens"):
        count_unigrams([Document("a", "zzz")], tokenizer, 20)
    with pytest.raises(InvalidInputError, match="found id 256, the model predicts 256 tokens"):
        count_unigrams([Document("a", "zzz")], tokenizer, 256)  # the end of the one document
    for smoothing in (0.0, -1.0, math.inf):
        with pytest.raises(InvalidInputError, match="smoothing: found"):
            count_unigrams([Document("a", "zzz")], tokenizer, 257, smoothing)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        count_unigrams([Document("a", "zzz")], tokenizer, 257)
