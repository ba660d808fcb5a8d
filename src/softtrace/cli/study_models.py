"""Several models of one study: names, tokenizers, whether they predict the same tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrace.data.blocks import evenly, pack
from softtrace.data.documents import Document
from softtrace.errors import InvalidInputError
from softtrace.evaluation.density_file import describe
from softtrace.model.loading import dtype_name, load_tokenizer
from softtrace.tracing.attach import attach


def tokenizers_of(
    models: Sequence[str], first: Any, held_out: list[Document], size: int, chosen: Tensor
) -> list[Any]:
    """The models' tokenizers; that of the first for all that turn the text into the same blocks.

    Args:
        models: paths.
        first: the first one's tokenizer.
        held_out: documents.
        size: tokens of a block.
        chosen: ``[N, size]`` blocks of the first one's tokens.
    """
    found = [first]
    for model in models[1:]:
        own = load_tokenizer(model)
        same = own.get_vocab() == first.get_vocab() and torch.equal(
            evenly(pack(held_out, own, size), len(chosen)), chosen
        )
        found.append(first if same else own)
    return found


def check_same_tokens(models: Sequence[str], tokenizers: Sequence[Any]) -> None:
    """Raise :class:`InvalidInputError` where a tokenizer reads the text unlike the first.

    Args:
        models: paths.
        tokenizers: see :func:`tokenizers_of`.
    """
    first = tokenizers[0]
    for model, own in zip(models, tokenizers, strict=True):
        if own is first:
            continue
        what = "turn the text into other tokens"
        if own.get_vocab() != first.get_vocab():
            what = f"have other vocabularies ({len(first)} and {len(own)} tokens)"
        raise InvalidInputError(
            f"models: the tokenizers of {models[0]} and {model} {what}; they are compared on "
            "the same tokens, so expected models of one tokenizer. Study them one by one, or on "
            "the same texts with --paper true"
        )


def check_alike(models: Sequence[Mapping[str, Any]], one_tokenizer: bool) -> None:
    """Raise :class:`InvalidInputError` where the last of them cannot be compared with the first.

    It has another number format, or predicts other tokens though the tokenizer is the same.
    """
    first, last = models[0], models[-1]
    if first["dtype"] != last["dtype"]:
        raise InvalidInputError(
            f"models: --dtype auto took {first['dtype']} for {first['path']} and {last['dtype']} "
            f"for {last['path']}; expected one number format, since rounding changes densities. "
            "Give --dtype float32"
        )
    if one_tokenizer and first["vocabulary"] != last["vocabulary"]:
        raise InvalidInputError(
            f"models: {first['path']} predicts {first['vocabulary']} tokens and {last['path']} "
            f"{last['vocabulary']}; expected the same vocabulary, to compare predictions token by "
            "token"
        )


def described(network: Any, path: str) -> dict[str, Any]:
    """What result files say of a model, with its format and the number of tokens it predicts."""
    predicted = attach(network).anatomy.readout.predicted
    return {
        **describe(network, path), "dtype": dtype_name(network.dtype), "vocabulary": predicted,
    }  # fmt: skip


def labels(models: Sequence[str]) -> list[str]:
    """The models' names; those that several have are numbered, or of two are before and after."""
    names = [Path(model).resolve().name for model in models]
    twice = {name for name, count in Counter(names).items() if count > 1}
    if len(names) == 2 and twice:
        return [f"{name} ({when})" for name, when in zip(names, ("before", "after"), strict=True)]
    return [
        f"{name} ({place})" if name in twice else name for place, name in enumerate(names, start=1)
    ]
