"""Texts of the benchmark on real models: what is held out was not trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes.benchmarks.comparison.real_texts import copied, copied_of, digest, without_copies
from softtrace.data import Document

LINES = [f"line {number} of a text that says something, at some length" for number in range(10)]


def text(name: str, *lines: str) -> Document:
    return Document(name, "\n".join(lines))


def test_another_version_of_a_held_out_document_is_not_trained_on() -> None:
    held_out = [text("v1/a", *LINES)]
    version = text("v2/a", *LINES[:6], *(f"{line}, again" for line in LINES[6:]))
    other = text("v2/b", *LINES[:4], *(f"{line}, again" for line in LINES[4:]))
    short = text("c", "short", "lines")
    assert without_copies([version, other, short], held_out) == [other, short]
    assert copied([version, other, short], held_out) == 0.6
    assert copied([other, short], held_out) == 0.4


def test_blocks_of_another_text_have_another_digest() -> None:
    blocks = {"train": torch.arange(8), "held_out": torch.arange(4)}
    assert digest(blocks) == digest({name: each.clone() for name, each in blocks.items()})
    assert digest(blocks) != digest({**blocks, "held_out": torch.arange(1, 5)})
    assert digest(blocks) != digest({**blocks, "train": torch.arange(9)})


def test_blocks_that_do_not_say_what_they_have_copied_are_refused(tmp_path: Path) -> None:
    blocks = tmp_path / "a prose.safetensors"
    save_file({"train": torch.arange(8)}, blocks, {"copied": "0.0384"})
    assert copied_of(blocks) == 0.0384
    save_file({"train": torch.arange(8)}, blocks)
    with pytest.raises(SystemExit, match="make its tokens anew"):
        copied_of(blocks)
