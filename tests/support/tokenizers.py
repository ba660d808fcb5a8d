"""One small tokenizer of every common kind, none of which needs a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.corpus import END, byte_tokenizer, word_tokenizer

TEXTS = {
    "German": "Grüße aus Köln, schöne Straße",
    "Japanese": "日本語のテキストを読む。",
    "Hindi": "नमस्ते दुनिया",
    "emoji": "good 👩‍👩‍👧‍👦 🏳️‍🌈 🎉",
    "white space": "foo\tbar\r\nbaz  \n\n x ",
    "replacement": "a sign \ufffd here",
}
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2's, with pieces of several bytes that begin and end inside of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def byte_fallback() -> PreTrainedTokenizerBase:
    """As Gemma's: SentencePiece, where ``<0xE2>`` is a byte of what is not in the vocabulary."""
    return _fallback(normalizers.Replace(" ", "▁"), [])


def byte_fallback_after_a_space() -> PreTrainedTokenizerBase:
    """As Llama 2's: a text is given a space to begin with, which decoding takes away."""
    prefixed = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fallback(prefixed, [decoders.Strip(" ", 1, 0)])


def _fallback(normalizer: Any, last: list[Any]) -> PreTrainedTokenizerBase:
    pieces = [END, *_BYTES, "▁", *"aekol日の\ufffd", "▁a", "ko"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("k", "o")], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def word_piece() -> PreTrainedTokenizerBase:
    """As BERT's: ``##`` continues a word, and what is between words is not kept."""
    pieces = [END, "[UNK]", "a", "good", "foo", "##s", "##o", ",", "日", "本"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


Make = Callable[[], PreTrainedTokenizerBase]
#: those that give every text back, but for the "▁" of SentencePiece
LOSSLESS: tuple[Make, ...] = (
    byte_tokenizer,
    byte_level,
    byte_fallback,
    byte_fallback_after_a_space,
)
KINDS: tuple[Make, ...] = (*LOSSLESS, word_tokenizer, word_piece)
