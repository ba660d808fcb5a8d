"""How near a prediction is to the frequencies of tokens in a corpus, whatever stands before.

The shallow statistic that a small trace may be all about: arXiv 2605.27033, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrace.checks import check_range
from softtrace.data.documents import Document
from softtrace.data.encoding import stream_tokens
from softtrace.density.distortion import log_probabilities
from softtrace.errors import DataError, InvalidInputError
from softtrace.metrics.functional import mid_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READINGS = ("unigram_kl", "unigram_spearman")
"""What :meth:`Unigrams.read` gives, in its order."""


@dataclass(frozen=True)
class Unigrams:
    """The unigram distribution of a corpus.

    Attributes:
        counts: ``[V]`` int64, how often each token is in it.
        smoothing: added to each count, so that the divergence from it is finite.
    """

    counts: Tensor
    smoothing: float

    @property
    def probabilities(self) -> Tensor:
        """``[V]`` float64, (count + smoothing) / (all tokens + smoothing · V)."""
        weight = self.counts.double() + self.smoothing
        return weight / weight.sum()

    @property
    def entropy(self) -> float:
        """Entropy of the smoothed distribution, nats."""
        shares = self.probabilities
        return float(-(shares * shares.log()).sum())

    @property
    def uniform_divergence(self) -> float:
        """KL(uniform ‖ smoothed unigrams), nats: what a prediction of nothing at all has."""
        return float(-self.probabilities.log().mean() - math.log(len(self.counts)))

    def read(self, logits: Tensor) -> Tensor:
        """Compare predictions with the corpus.

        Args:
            logits: ``[n, V]``.

        Returns:
            ``[n, 2]`` float64: KL(prediction ‖ smoothed unigrams) in nats, and Spearman's rank
            correlation of the two over the tokens that the corpus holds at least once (all others
            tie, so that their order says nothing). The correlation is 0 where all of these are
            predicted alike, as by a trace without an edge, and NaN where they are equally frequent.
        """
        shares = self.probabilities.to(logits.device)
        logs = log_probabilities(logits).double()
        divergence = (logs.exp() * (logs - shares.log())).sum(-1)
        seen = (self.counts > 0).to(logits.device)
        expected = mid_ranks(shares[seen])
        expected = expected - expected.mean()
        found = mid_ranks(logits[:, seen])
        found = found - found.mean(-1, keepdim=True)
        lengths = (found**2).sum(-1).sqrt(), (expected**2).sum().sqrt()
        correlation = torch.where(lengths[0] > 0, found @ expected / lengths[0], 0.0) / lengths[1]
        return torch.stack((divergence, correlation), dim=-1)


def count_unigrams(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    smoothing: float = 1.0,
) -> Unigrams:
    """Count the tokens of a corpus as a model reads it, documents ended by end-of-sequence.

    Args:
        documents: of the training side of a split.
        tokenizer: the model's.
        vocabulary: of the model's logits, V.
        smoothing: added to each count, > 0.

    Raises:
        DataError: no documents, or the tokenizer has no end-of-sequence token.
        InvalidInputError: smoothing not positive, or ids beyond the vocabulary.
    """
    check_range("smoothing", smoothing, 0.0, float("inf"), open_low=True, open_high=True)
    if not documents:
        raise DataError(
            "the corpus: found no document on the training side of the split, of which the "
            "unigrams are counted; give more documents, or another held_out_share or salt"
        )
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for ids in _ended(documents, tokenizer):
        if len(ids) and int(ids.max()) >= vocabulary:
            raise InvalidInputError(
                f"tokenizer: found id {int(ids.max())}, the model predicts {vocabulary} tokens; "
                "is the tokenizer the model's own?"
            )
        # In place: pieces are often short, and a vocabulary of counts for each would take long.
        counts.index_add_(0, ids, torch.ones_like(ids))
    return Unigrams(counts, smoothing)


def _ended(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """The tokens piece by piece; an end-of-sequence stands behind the last document too."""
    yield from stream_tokens(documents, tokenizer)
    yield torch.tensor([tokenizer.eos_token_id])
