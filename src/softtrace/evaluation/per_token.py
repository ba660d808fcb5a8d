"""``tokens.jsonl``: what was measured at every explained token, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrace.density.exits import exit_layers
from softtrace.evaluation.parts import Part, Parts
from softtrace.evaluation.token_text import TokenText
from softtrace.files import atomic_path

NAME = "tokens.jsonl"


def write_tokens(
    folder: Path,
    parts: Parts,
    planned: list[Part],
    blocks: Tensor,
    min_context: int,
    tokenizer: Any,
) -> Path:
    """Write ``tokens.jsonl``, in the order of blocks and positions; one part is read at a time.

    Each line has ``sequence`` (number of the block), ``position`` in it, ``token_id`` and ``token``
    (what it adds to the text of the block, nothing where a later token completes the character:
    :class:`softtrace.evaluation.token_text.TokenText`), ``next_id`` and ``next`` (what has to be
    predicted there), ``entropy`` and ``loss`` in nats, ``size_at_tv_0.2`` (share of all edges),
    ``area`` (mean TV), and ``exit_layer`` (:func:`softtrace.density.exits.exit_layers`).

    Args:
        folder: to write to.
        parts, planned: what was measured.
        blocks: ``[N, T]`` ids, without padding.
        min_context: the first explained position.
        tokenizer: of the ids.

    Returns:
        The path that was written.
    """
    path = folder / NAME
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in _lines(parts, planned, blocks, min_context, tokenizer):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _lines(
    parts: Parts, planned: list[Part], blocks: Tensor, min_context: int, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    text = TokenText(tokenizer)
    places = range(min_context, blocks.shape[1] - 1)
    for part in planned:
        found = parts.read_part(part)
        columns = [
            torch.cat(values).tolist()
            for values in (found.entropy, found.loss, found.size, found.area)
        ]
        rows = zip(*columns, exit_layers(torch.cat(found.agreement, 1)).tolist(), strict=True)
        for sequence in range(part.first, part.end):
            ids = blocks[sequence].tolist()
            texts = text.of_text(ids)
            for position in places:
                entropy, loss, size, area, layer = next(rows)
                here, after = ids[position], ids[position + 1]
                yield {
                    "sequence": sequence,
                    "position": position,
                    "token_id": here,
                    "token": texts[position],
                    "next_id": after,
                    "next": texts[position + 1],
                    "entropy": entropy,
                    "loss": loss,
                    "size_at_tv_0.2": size,
                    "area": area,
                    "exit_layer": layer,
                }
