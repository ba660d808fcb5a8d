"""Documents to one row of tokens, as the model's tokenizer begins and ends them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrace.data.documents import Document
from softtrace.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Characters handed to the tokenizer at once: enough for its threads, and little enough that the
# Python lists of ids (some 36 bytes a token) stay small next to the resulting tensor.
_CHARACTERS_PER_CALL = 4_000_000


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


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of all documents in a row, the end-of-sequence token between each two.

    What a document's ``special_tokens`` says decides how special tokens that are spelled out in it
    are read. Nothing is put in front of a document; :func:`softtrace.data.pack` begins its blocks
    as the tokenizer begins a text.

    Returns:
        ``[tokens]`` int64 on the CPU.

    Raises:
        DataError: no documents, or the tokenizer has no end-of-sequence token.
    """
    return torch.cat(list(stream_tokens(documents, tokenizer)))


def stream_tokens(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Tensor]:
    """:func:`encode` in pieces: memory holds some four million characters, or one document.

    Yields:
        ``[tokens]`` int64 on the CPU.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "the tokenizer has no end-of-sequence token to put between documents. Set one, such as "
            "tokenizer.eos_token = '<|endoftext|>', and save the tokenizer."
        )
    reader = _SpecialTokens(tokenizer)
    ended: bool | None = None  # whether the document before ended by itself; None for the first
    for portion in _portions(documents):
        are_tokens = [reader.are_tokens(document) for document in portion]
        for document, ids, special in zip(
            portion, _encoded(portion, are_tokens, tokenizer), are_tokens, strict=True
        ):
            if ended is False:
                yield torch.tensor([end])
            ended = special and document.text.rstrip().endswith(str(tokenizer.eos_token))
            yield torch.tensor(ids, dtype=torch.int64)
    if ended is None:
        raise DataError("there are no documents to encode. Check the path and the held-out share.")


def _encoded(
    documents: Sequence[Document], are_tokens: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The ids of each document, in order; the tokenizer is called once for each way of reading."""
    found: dict[int, list[int]] = {}
    for special in set(are_tokens):
        places = [place for place, each in enumerate(are_tokens) if each == special]
        encoded = tokenizer(
            [documents[place].text for place in places],
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # or it warns of every document that is longer than the model's context
        )
        found.update(zip(places, encoded["input_ids"], strict=True))
    return [found[place] for place in range(len(documents))]


class _SpecialTokens:
    """Decides of each document whether the special tokens that are spelled out in it are tokens.

    Under ``"auto"`` they are in a text that begins or ends with one, as what a chat template
    rendered does. In any other text they are characters, so that only real borders look like
    borders; that is said once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._spelled = tuple(token for token in tokenizer.all_special_tokens if token.strip())
        self._said = False

    def are_tokens(self, document: Document) -> bool:
        """Whether they are, in this one."""
        if document.special_tokens != "auto":
            return document.special_tokens == "tokens"
        text = document.text.strip()
        if text.startswith(self._spelled) or text.endswith(self._spelled):
            return True
        spelled = next((token for token in self._spelled if token in text), None)
        if spelled is not None and not self._said:
            self._said = True
            logger.warning(
                "%s: found the special token %r inside a text that neither begins nor ends with "
                "one, so it is read as plain characters; pass special_tokens='tokens' if your "
                "texts were rendered by a chat template, or 'characters' if they were not",
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
