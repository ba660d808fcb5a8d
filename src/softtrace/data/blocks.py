"""Documents to blocks of tokens of one length, whole or streamed.

A text of any size is tokenized once and kept on disk, few of its blocks in memory. Which blocks are
chosen evenly depends on how many there are, which is known at the end of the text only. Blocks of
one length matter here more than elsewhere: the share of edges that a trace needs depends on the
length of the sequence, so densities are only comparable between sequences of equal length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from torch import Tensor

from softtrace.checks import check_least
from softtrace.data.documents import Document
from softtrace.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES = 4  # of a token in the file: no vocabulary reaches 2^31

# Characters handed to the tokenizer at once: enough for its threads, and little enough that the
# Python lists of ids (some 36 bytes a token) stay small next to the resulting tensor.
_CHARACTERS_PER_CALL = 4_000_000


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
    check_block_size(block_size)
    seen = 0

    def counted() -> Iterator[Document]:
        nonlocal seen
        for document in documents:
            seen += 1
            yield document

    with tempfile.TemporaryFile() as opened:
        file = cast("BinaryIO", opened)
        tokens = 0
        for piece in stream_tokens(counted(), tokenizer):
            file.write(piece.to(torch.int32).numpy().tobytes())
            tokens += len(piece)
        places = even_places(full_blocks(seen, tokens, block_size), count)
        blocks = torch.empty(len(places), block_size, dtype=torch.int64)
        for row, place in zip(blocks, places.tolist(), strict=True):
            file.seek(place * block_size * _BYTES)
            content = bytearray(file.read(block_size * _BYTES))
            row.copy_(torch.frombuffer(content, dtype=torch.int32))
    return blocks, seen


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of all documents in a row, the end-of-sequence token between each two.

    Special tokens spelled out in a text are encoded as the plain characters they are there, so that
    only real borders look like borders.

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
    separator = None
    for texts in _portions(document.text for document in documents):
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # or it warns of every document that is longer than the model's context
        )
        for ids in encoded["input_ids"]:
            if separator is not None:
                yield separator
            separator = torch.tensor([end])
            yield torch.tensor(ids, dtype=torch.int64)
    if separator is None:
        raise DataError("there are no documents to encode. Check the path and the held-out share.")


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_CALL:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Tensor:
    """Encode the documents and cut the row of tokens into full blocks, dropping the remainder.

    Args:
        documents: at least one.
        tokenizer: with an end-of-sequence token.
        block_size: tokens in a block, at least 2 (the first has nothing to be predicted from).

    Returns:
        ``[N, block_size]`` int64, N >= 1.

    Raises:
        DataError: not one full block, or what :func:`encode` refuses.
        InvalidInputError: the block size is below 2.
    """
    check_block_size(block_size)
    tokens = encode(documents, tokenizer)
    blocks = full_blocks(len(documents), len(tokens), block_size)
    return tokens[: blocks * block_size].view(blocks, block_size)


def check_block_size(block_size: int) -> None:
    """Raise :class:`softtrace.InvalidInputError` where a block has nothing to be predicted."""
    check_least("block_size", block_size, 2)


def full_blocks(documents: int, tokens: int, block_size: int) -> int:
    """How many full blocks a row of tokens gives.

    Raises:
        DataError: not one.
    """
    if tokens < block_size:
        raise DataError(
            f"{documents} documents give {tokens} tokens, less than one block of "
            f"{block_size}. Give more text, or a block_size of at most {tokens}."
        )
    return tokens // block_size


def evenly(blocks: Tensor, count: int) -> Tensor:
    """``count`` blocks evenly spaced over all, or all if there are fewer."""
    return blocks if len(blocks) <= count else blocks[even_places(len(blocks), count)]


def even_places(total: int, count: int) -> Tensor:
    """``[count]`` int64, which of ``total`` blocks :func:`evenly` takes; all if there are fewer."""
    return torch.arange(total) if total <= count else torch.linspace(0, total - 1, count).long()
