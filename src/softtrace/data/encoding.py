"""Documents to one row of tokens, as the model's tokenizer begins and ends them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from softtrace.data.chat import Spans, Writer, Written, spelled_tokens
from softtrace.data.documents import Document
from softtrace.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Characters handed to the tokenizer at once: enough for its threads, and little enough that the
# Python lists of ids (some 36 bytes a token) stay small next to the resulting tensor.
_CHARACTERS_PER_CALL = 4_000_000

IGNORED = -100
"""The label of a token that the loss does not count, as torch and transformers have it."""


def beginning(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that a tokenizer puts in front of a text, such as ``<bos>``.

    Returns:
        ``[P]`` int64, empty for a tokenizer that adds none.
    """
    whole, bare = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    places = range(len(whole) - len(bare) + 1)
    first = next((at for at in places if whole[at : at + len(bare)] == bare), 0)
    return torch.tensor(whole[:first], dtype=torch.int64)


class Tokens(NamedTuple):
    """Token ids, and which of them the loss counts.

    Attributes:
        ids: ``[...]`` int64 on the CPU.
        counted: ``[...]`` bool, of the same shape.
    """

    ids: Tensor
    counted: Tensor

    @property
    def labels(self) -> Tensor:
        """``[...]`` int64: the ids, and -100 where the loss looks away; models shift them."""
        return self.ids.masked_fill(~self.counted, IGNORED)


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of all documents in a row, the end-of-sequence token between each two.

    What a document's ``special_tokens`` says decides how special tokens that are spelled out in it
    are read. Nothing is put in front of a document; :func:`softtrace.data.pack` begins its blocks
    as the tokenizer begins a text. Conversations are written out by the tokenizer's chat template.

    Returns:
        ``[tokens]`` int64 on the CPU.

    Raises:
        DataError: no documents, or the tokenizer has no end-of-sequence token; conversations, and
            no chat template that can render them.
    """
    return torch.cat(list(stream_tokens(documents, tokenizer)))


def stream_tokens(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Tensor]:
    """:func:`encode` in pieces: memory holds some four million characters, or one document.

    Yields:
        ``[tokens]`` int64 on the CPU.
    """
    for piece in stream_counted(documents, tokenizer, answers_only=False):
        yield piece.ids


def stream_counted(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    answers_only: bool | None = None,
) -> Iterator[Tokens]:
    """The pieces of :func:`stream_tokens`, and which of their tokens the loss counts.

    An end-of-sequence token between two documents counts where the token before it does.

    Args:
        documents: one after the other.
        tokenizer: with an end-of-sequence token.
        answers_only: see :class:`softtrace.data.chat.Writer`.

    Yields:
        Pieces of the row of all tokens, ``[tokens]``.

    Raises:
        DataError: see :func:`encode`; answers alone shall count and cannot be told from the rest.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "the tokenizer has no end-of-sequence token to put between documents. Set one, such as "
            "tokenizer.eos_token = '<|endoftext|>', and save the tokenizer."
        )
    reader, writer = _SpecialTokens(tokenizer), Writer(tokenizer, answers_only)
    before: Tokens | None = None  # the document before this one, where it did not end by itself
    found = False
    for portion in _portions(documents):
        texts = [writer.write(document) for document in portion]
        are_tokens = [
            text.by_template or reader.are_tokens(document, text.text)
            for document, text in zip(portion, texts, strict=True)
        ]
        for text, tokens, special in zip(
            texts, _encoded(texts, are_tokens, tokenizer), are_tokens, strict=True
        ):
            found = True
            if before is not None:
                yield _ending(end, before)
            yield tokens
            ended = special and text.text.rstrip().endswith(str(tokenizer.eos_token))
            if text.ends and not ended:
                yield _ending(end, tokens)
            before = None if ended or text.ends else tokens
    if not found:
        raise DataError("there are no documents to encode. Check the path and the held-out share.")


def _ending(end: int, before: Tokens) -> Tokens:
    """The end-of-sequence token, which counts where what it ends does."""
    counted = before.counted[-1:] if len(before.counted) else torch.tensor([True])
    return Tokens(torch.tensor([end]), counted)


def _encoded(
    texts: Sequence[Written], are_tokens: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """The tokens of each text, in order; the tokenizer is called once for each way of reading."""
    found: dict[int, Tokens] = {}
    partly = any(text.counted is not None for text in texts)
    if partly and not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not say where in a text its tokens "
            "lie, so that the loss cannot count a part of them. Pass answers_only=False to count "
            "all, or use a fast tokenizer."
        )
    for special in set(are_tokens):
        places = [place for place, each in enumerate(are_tokens) if each == special]
        encoded = tokenizer(
            [texts[place].text for place in places],
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=partly,
            verbose=False,  # or it warns of every document that is longer than the model's context
        )
        for number, place in enumerate(places):
            ids = torch.tensor(encoded["input_ids"][number], dtype=torch.int64)
            spans, counted = texts[place].counted, torch.ones(len(ids), dtype=torch.bool)
            if spans is not None:
                special_ids = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
                counted = _in_spans(encoded["offset_mapping"][number], spans, special_ids)
            found[place] = Tokens(ids, counted)
    return [found[place] for place in range(len(texts))]


def _in_spans(offsets: list[tuple[int, int]], spans: Spans, special: Tensor) -> Tensor:
    """Which tokens lie in spans of characters, ``[tokens]`` bool.

    A token that reaches into a span from before it counts: the model has to write it whole. A
    special token does not: those that swallow the space behind them are not what is written there.

    Args:
        offsets: of each token, first character and the one behind its last.
        spans: of characters.
        special: ``[tokens]`` bool.
    """
    first, last = torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2).unbind(1)
    first = torch.minimum(first, last - 1)  # of space alone, some tokenizers say that it is nothing
    counted = torch.zeros(len(offsets), dtype=torch.bool)
    for begin, end in spans:
        counted |= (first < end) & torch.where(special, first >= begin, last > begin)
    return counted


class _SpecialTokens:
    """Decides of each document whether the special tokens that are spelled out in it are tokens.

    Under ``"auto"`` they are in a text that begins or ends with one, as what a chat template
    rendered does. In any other text they are characters, so that only real borders look like
    borders; that is said once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._spelled = spelled_tokens(tokenizer)
        self._said = False

    def are_tokens(self, document: Document, text: str) -> bool:
        """Whether they are, in this one, of which ``text`` is tokenized."""
        if document.special_tokens != "auto":
            return document.special_tokens == "tokens"
        text = text.strip()
        if text.startswith(self._spelled) or text.endswith(self._spelled):
            return True
        spelled = next((token for token in self._spelled if token in text), None)
        if spelled is not None and not self._said:
            self._said = True
            logger.warning(
                "%s: found the special token %r inside a text that neither begins nor ends with "
                "one, so it is read as plain characters; set special_tokens to 'tokens' if your "
                "texts were rendered by a chat template, or to 'characters' if they were not",
                document.name, spelled,
            )  # fmt: skip
        return False


def _portions(documents: Iterable[Document]) -> Iterator[list[Document]]:
    portion: list[Document] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += len(document.text)
        if size >= _CHARACTERS_PER_CALL:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
