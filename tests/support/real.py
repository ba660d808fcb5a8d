"""Real pretrained models for the tests marked ``real``, and a text that they have not seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace.data import Document, read_documents
from softtrace.model.loading import load_model, load_tokenizer

SMOLLM, GEMMA = "smollm2-135m", "gemma3-270m"
MODELS = (SMOLLM, GEMMA)
TEXT = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
"""English prose, and too new to have been learned by heart."""

LONG = 576
"""Tokens, more than Gemma's window of 512 sees."""

every_model = pytest.mark.parametrize("name", MODELS)


def place(name: str) -> str:
    """The directory of a model."""
    folder = Path(os.environ.get("SOFTTRACE_MODELS", "runs/models"), name)
    if not folder.is_dir():
        pytest.fail(
            f"found no {folder}: `make test-real` gets the models; or run `python -m "
            "recipes.real_models DIR` and set SOFTTRACE_MODELS=DIR"
        )
    return str(folder)


def real_model(name: str, dtype: str) -> Any:
    """In eval mode."""
    return load_model(place(name), dtype=dtype).eval()


def real_tokenizer(name: str) -> Any:
    return load_tokenizer(place(name))


def documents() -> list[Document]:
    return list(read_documents(TEXT))


def prompt(tokenizer: Any, length: int, *, bos: bool) -> Tensor:
    """``[1, length]`` ids of the text's beginning, ``<bos>`` being the first of them or not."""
    ids = tokenizer.encode(TEXT.read_text("utf-8"), add_special_tokens=False)
    ids = [tokenizer.bos_token_id] * bos + ids
    return torch.tensor([ids[:length]])
