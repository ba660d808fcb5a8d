"""Documents to blocks of tokens of one length, whole or streamed.

A text of any size is tokenized once and kept on disk, few of its blocks in memory. Which blocks are
chosen evenly depends on how many there are, which is known at the end of the text only. Blocks of
one length matter here more than elsewhere: the share of edges that a trace needs depends on the
length of the sequence, so densities are only comparable between sequences of equal length.

A block begins as the tokenizer begins a text: a model that was trained with ``<bos>`` in front of
every text predicts badly without one. That token takes the first place of the block.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from torch import Tensor

from softtrace.checks import check_least
from softtrace.data.documents import Document
from softtrace.data.encoding import Tokens, beginning, stream_counted
from softtrace.errors import DataError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LEAST = 4  # tokens of a block that every command takes
_BYTES = 4  # of a token in the file: no vocabulary reaches 2^31


def stream_evenly(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    count: int,
) -> tuple[Tensor, int]:
    """``evenly(pack(documents, tokenizer, block_size), count)``, and the number of documents.

    Memory holds what the tokenizer is given at once (four million characters, or the longest
    document) and the chosen blocks; all tokens lie in a temporary file of 4 bytes a token, which
    has no name and goes when this returns or the process ends.

    Returns:
        ``[N, block_size]`` int64, 1 <= N <= count, and how many documents were read.

    Raises:
        DataError, InvalidInputError: see :func:`softtrace.data.pack`.
        OSError: no space for the temporary file (TMPDIR names another place).
    """
    check_block_size(block_size, tokenizer)
    seen = 0

    def counted() -> Iterator[Document]:
        nonlocal seen
        for document in documents:
            seen += 1
            yield document

    with tempfile.TemporaryFile() as opened:
        file = cast("BinaryIO", opened)
        total = 0
        for block in _blocks(counted(), tokenizer, block_size):
            file.write(block.ids.to(torch.int32).numpy().tobytes())
            total += 1
        places = even_places(total, count)
        blocks = torch.empty(len(places), block_size, dtype=torch.int64)
        for row, place in zip(blocks, places.tolist(), strict=True):
            file.seek(place * block_size * _BYTES)
            content = bytearray(file.read(block_size * _BYTES))
            row.copy_(torch.frombuffer(content, dtype=torch.int32))
    return blocks, seen


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    option: str = "block_size",
) -> Tensor:
    """Encode the documents and cut the row of tokens into full blocks, dropping the remainder.

    Each block begins with the tokens that the tokenizer puts in front of a text (:func:`beginning`,
    counted in ``block_size``), but where the row itself has them there.

    Args:
        documents: Documents, at least one.
        tokenizer: Tokenizer with an end-of-sequence token.
        block_size: Tokens in a block, at least 2 (the first has nothing to be predicted from), and
            one more than the tokenizer puts in front.
        option: What the caller calls it, for errors.

    Returns:
        ``[N, block_size]`` int64, N >= 1.

    Raises:
        DataError: There is not one full block, or something that :func:`encode` refuses.
        InvalidInputError: The block size is too small.
    """
    check_block_size(block_size, tokenizer, option)
    blocks = _blocks(documents, tokenizer, block_size, option=option)
    return torch.stack([block.ids for block in blocks])


def pack_with_labels(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    answers_only: bool | None = None,
) -> Tokens:
    """The blocks of :func:`pack`, and which of their tokens the loss counts (``.labels``).

    Of plain text and of conversations all tokens count, and of a prompt and its completion the
    completion alone, unless ``answers_only`` says otherwise. What a block was begun with does not
    count, and blocks of which nothing would are dropped: their mean loss is not a number.

    Args:
        documents: Documents, at least one.
        tokenizer: Tokenizer with an end-of-sequence token, and with a chat template where documents
            hold messages.
        block_size: See :func:`pack`.
        answers_only: True to count of conversations what the assistant says, and of completions
            the same (plain text is refused); False to count everything, prompts too.

    Returns:
        ``[N, block_size]``, N >= 1.

    Raises:
        DataError: There is no block with a token that counts, :func:`pack` refuses the text, or
            answers cannot be told from the rest.
        InvalidInputError: The block size is too small.
    """
    check_block_size(block_size, tokenizer)
    blocks = list(_blocks(documents, tokenizer, block_size, answers_only))
    kept = [block for block in blocks if block.counted[1:].any()]  # the first is never predicted
    if not kept:
        raise DataError(
            f"the loss counts no token of {len(blocks)} blocks of {block_size} tokens. Check that "
            "the data has answers (messages of the role 'assistant', completions), or leave "
            "answers_only out."
        )
    if len(kept) < len(blocks):
        logger.info(
            "%d of %d blocks are left out, in which the loss counts no token",
            len(blocks) - len(kept), len(blocks),
        )  # fmt: skip
    return Tokens(*(torch.stack(part) for part in zip(*kept, strict=True)))


def check_block_size(
    block_size: int, tokenizer: PreTrainedTokenizerBase, option: str = "block_size"
) -> None:
    """Raise :class:`softtrace.InvalidInputError` where a block has nothing to be predicted."""
    check_least(option, block_size, 2)
    added = len(beginning(tokenizer))
    if block_size <= added:
        raise InvalidInputError(
            f"{option}: found {block_size}, allowed are integers from {added + 1}: the tokenizer "
            f"puts {added} tokens in front of every text"
        )


def _blocks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    answers_only: bool | None = False,
    option: str = "block_size",
) -> Iterator[Tokens]:
    """The full blocks one by one, ``[block_size]`` each; at least one, or a DataError."""
    first = beginning(tokenizer)
    begun = Tokens(first, torch.zeros(len(first), dtype=torch.bool))
    row = _cut(begun, 0, 0)
    tokens = count = 0
    for piece in stream_counted(documents, tokenizer, answers_only):
        row = _joined(row, piece)
        tokens += len(piece.ids)
        while len(row.ids) >= block_size - len(first):
            own = torch.equal(row.ids[: len(first)], first)
            taken = block_size if own else block_size - len(first)
            if len(row.ids) < taken:
                break
            head = _cut(row, 0, taken)
            yield head if own else _joined(begun, head)
            row = _cut(row, taken, len(row.ids))
            count += 1
    if not count:
        fits = tokens + len(first)
        shorter = f", or a {option} of at most {fits}" if fits >= _LEAST else ""
        found = "1 token" if tokens == 1 else f"{tokens} tokens"
        raise DataError(
            f"the text gives {found}, less than one block of {block_size}. Give more text{shorter}."
        )


def _cut(row: Tokens, start: int, end: int) -> Tokens:
    return Tokens(row.ids[start:end], row.counted[start:end])


def _joined(one: Tokens, other: Tokens) -> Tokens:
    return Tokens(torch.cat((one.ids, other.ids)), torch.cat((one.counted, other.counted)))


def evenly(blocks: Tensor, count: int) -> Tensor:
    """``count`` blocks evenly spaced over all, or all if there are fewer."""
    return blocks if len(blocks) <= count else blocks[even_places(len(blocks), count)]


def even_places(total: int, count: int) -> Tensor:
    """``[count]`` int64, which of ``total`` blocks :func:`evenly` takes; all if there are fewer."""
    if total <= count:
        return torch.arange(total)
    # Beyond 2^24 blocks float32 rounds, and up.
    return torch.linspace(0, total - 1, count).long().clamp(max=total - 1)
