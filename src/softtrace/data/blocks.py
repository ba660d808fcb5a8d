"""Evenly chosen blocks of a text of any size: tokenized once, kept on disk, few of them in memory.

Which blocks are chosen depends on how many there are, which is known at the end of the text only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from torch import Tensor

from softtrace.data.documents import (
    Document,
    check_block_size,
    even_places,
    full_blocks,
    stream_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
