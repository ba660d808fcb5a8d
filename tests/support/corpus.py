"""Small texts and a tokenizer of bytes, so that tests need neither files nor the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.tiny import tiny_model

END = "<end>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, 256 of them, and ``<end>`` with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def word_tokenizer() -> PreTrainedTokenizerBase:
    """As SentencePiece's: a token holds the space before it, which is dropped where a text begins.

    Decoding a token alone therefore says ``the`` for `` the``.
    """
    words = ["<unk>", END, *(f"▁{word}" for word in ("the", "cat", "a")), *"▁thecas", "\n"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


def write_tree(root: Path, files: int = 40, lines: int = 6) -> Path:
    """A folder of small Python files in two sub-folders, no two of which are equal."""
    for number in range(files):
        folder = root / f"part{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"value_{number} = {number} * {line}\n" for line in range(lines))
        (folder / f"file{number}.py").write_text(text, encoding="utf-8")
    return root


def write_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A model directory: a tiny model that reads bytes, as safetensors, and its tokenizer."""
    tiny_model(
        family, vocab_size=257, eos_token_id=256, pad_token_id=256, **overrides
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
