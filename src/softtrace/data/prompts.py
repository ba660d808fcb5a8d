"""Prompts as they are: every document one, of its own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrace.checks import check_least
from softtrace.data.blocks import even_places
from softtrace.data.chat import asked
from softtrace.data.documents import Document
from softtrace.data.encoding import beginning, stream_counted
from softtrace.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def whole_prompts(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, longest: int, count: int
) -> list[Tensor]:
    """What stands before the first answer of each document, or all of it where there is none.

    Of a conversation without an answer it is all, and how the template begins one.

    Args:
        documents: texts, rows with a prompt and a completion, or conversations.
        tokenizer: the model's. What it puts in front of a text stands in front of each prompt.
        longest: tokens of a prompt at most; of longer ones the last are taken.
        count: prompts to take, evenly spaced; all if there are fewer.

    Returns:
        ``[T]`` int64 each, 1 <= T <= ``longest``.

    Raises:
        InvalidInputError: ``longest`` leaves no room for a token of a prompt.
        DataError: no documents, or none with a token; see :func:`softtrace.data.encoding.encode`.
    """
    first = beginning(tokenizer)
    check_least("longest", longest, len(first) + 1)
    prompts = []
    for place in even_places(len(documents), count).tolist():
        document = documents[place]
        # The end that is put behind a document is none of a prompt's.
        tokens, *_ = stream_counted([document], tokenizer, answers_only=document.rendered or None)
        ids, answers = tokens.ids, tokens.counted.nonzero()
        if document.rendered and len(answers):
            ids = ids[: int(answers[0])]
        elif document.rendered:
            text = asked(document, tokenizer)
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if torch.equal(ids[: len(first)], first):
            ids = ids[len(first) :]
        if len(ids):
            prompts.append(torch.cat((first, ids[-(longest - len(first)) :])))
    if not prompts:
        raise DataError(
            f"found no prompt in {len(documents)} documents. Check the path and the held-out share."
        )
    return prompts
