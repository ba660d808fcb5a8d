"""The same texts for models of different tokenizers: what stands before a token, and the token.

One tokenizer's blocks fix the texts. Another one encodes the same characters for itself. Its
tokens seldom end where the others do, so its context may be shorter by a part of a word, and the
token after it is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softtrace.data.encoding import beginning
from softtrace.evaluation.token_text import TokenText


@dataclass(frozen=True)
class SameTexts:
    """Inputs that all tokenizers have.

    Attributes:
        inputs: for each tokenizer the ids of every input, ``[T_n]`` int64; the last of them is what
            the others predict.
        left_out: why blocks are not among them, and how many.
    """

    inputs: list[list[Tensor]]
    left_out: dict[str, int]


class _LeftOut(Exception):
    """Why a tokenizer cannot have a text."""


def same_texts(blocks: Tensor, tokenizers: Sequence[Any]) -> SameTexts:
    """Every block as each tokenizer has it.

    Args:
        blocks: ``[N, T]`` ids of the first tokenizer, T >= 2. All but the last are the context.
        tokenizers: of the models; the same object for those that read alike.

    A block is left out for all of them where the text of its context and of the token after it
    begins or ends inside of a character, or holds U+FFFD or special tokens other than ends of
    documents (which become the other tokenizer's own); where another tokenizer does not give the
    text back from its tokens; or where no token of it ends within the context, or none comes after.
    """
    first = tokenizers[0]
    codecs = {id(each): (each, TokenText(each), beginning(each).tolist()) for each in tokenizers}
    inputs: list[list[Tensor]] = [[] for _ in tokenizers]
    left_out: Counter[str] = Counter()
    for block in blocks:
        try:
            ids = block[len(codecs[id(first)][2]) :].tolist()
            before, whole = (_texts(part, *codecs[id(first)][:2]) for part in (ids[:-1], ids))
            end = _length(before)
            others = {
                key: [*begun, *_input(whole, end, tokenizer, reader)]
                for key, (tokenizer, reader, begun) in codecs.items()
                if tokenizer is not first
            }
        except _LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        for own, tokenizer in zip(inputs, tokenizers, strict=True):
            own.append(block if tokenizer is first else torch.tensor(others[id(tokenizer)]))
    return SameTexts(inputs, dict(left_out))


def _texts(ids: list[int], tokenizer: Any, reader: TokenText) -> list[str]:
    """The texts of the documents that a row of tokens holds, cut at their ends."""
    texts = []
    for part in _split(ids, tokenizer.eos_token_id):
        if set(part) & set(tokenizer.all_special_ids):
            raise _LeftOut("special tokens in the text")
        texts.append("".join(reader.of_text(part)))
    if any("\ufffd" in text for text in texts):
        raise _LeftOut("a character that is cut")
    return texts


def _split(ids: list[int], end: int) -> Iterator[list[int]]:
    part: list[int] = []
    for token in ids:
        if token == end:
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _length(texts: list[str]) -> int:
    """The length in characters, where the end of a document counts as one."""
    return sum(map(len, texts)) + len(texts) - 1


def _input(texts: list[str], context: int, tokenizer: Any, reader: TokenText) -> list[int]:
    """Another tokenizer's tokens that end within the context, and the one after them.

    Args:
        texts: of the documents in a row.
        context: its length, as :func:`_length` counts.
        tokenizer, reader: the other one's.
    """
    ids: list[int] = []
    place = within = 0
    for number, text in enumerate(texts):
        if number:
            ids.append(tokenizer.eos_token_id)
            place += 1
            within = len(ids) if place <= context else within
        own = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        said = reader.of_text(own)
        if "".join(said) != text:
            raise _LeftOut("a tokenizer that does not give the text back")
        for token, part in zip(own, said, strict=True):
            ids.append(token)
            place += len(part)
            # A token without text of its own is a part of a character that a later one completes.
            within = len(ids) if part and place <= context else within
    if not within:
        raise _LeftOut("no token within the context")
    if within == len(ids):
        raise _LeftOut("no token after the context")
    return ids[: within + 1]
