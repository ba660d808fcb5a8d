"""Small texts and a tokenizer of bytes, so that tests need neither files nor the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.tiny import tiny_model

END = "<end>"

#: as SmolLM's and Qwen 2.5's, but without a system message of its own
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, 256 of them, and ``<end>`` with id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """The tokenizer of bytes with ``<|im_start|>`` (257), ``<|im_end|>`` (258) and a template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


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


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet file of rows; takes the extra ``softtrace[data]``."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A model directory: a tiny model that reads bytes, as safetensors, and its tokenizer."""
    tiny_model(
        family, vocab_size=257, eos_token_id=256, pad_token_id=256, **overrides
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_chat_model(folder: Path) -> Path:
    """:func:`write_model` with a tokenizer that has a chat template."""
    tiny_model("llama", vocab_size=259, eos_token_id=256).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
