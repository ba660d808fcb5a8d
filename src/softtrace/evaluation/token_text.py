"""What a token says inside of a text, which is not always what it says alone."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {sign: byte for byte, sign in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
_BYTE_NAME = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's, for what is not in the vocabulary
_LONE_BYTES = re.compile("[\udc80-\udcff]+")  # as the error handler "surrogateescape" leaves them


class TokenText:
    """The text of tokens, such that texts of tokens in a row add up to the text.

    Tokenizers that work on bytes split characters: Japanese, Hindi and emoji are often two or three
    tokens each. Such a character is the text of the token that completes it, and the text of those
    before it is empty. Bytes that cannot become a character, as where a block begins inside of one,
    are U+FFFD. Special tokens, and others without any text, go by their names in the vocabulary.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._known: dict[int, bytes] = {}
        self.restart()

    def restart(self) -> None:
        """Begin another text: the next token is its first one."""
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def __call__(self, token: int) -> str:
        """The text of the token with this id, after those of the calls before."""
        said = self._bytes(token)
        # Most tokenizers of SentencePiece drop the space that a text begins with.
        if self._at_start and said[:1] == b" " and self._decode([token]).encode() == said[1:]:
            said = said[1:]
        self._at_start = False
        return self._characters.decode(said)

    def of_text(self, tokens: Iterable[int]) -> list[str]:
        """The texts of all tokens of one text; a character that its end cuts off is U+FFFD."""
        self.restart()
        texts = [self(token) for token in tokens]
        if texts:
            texts[-1] += self._characters.decode(b"", final=True)
        return texts

    def alone(self, token: int) -> str:
        """What can be said of a token by itself: parts of characters are bytes, as in ``⟨E381⟩``.

        The space that a token begins with is kept.
        """
        text = self._bytes(token).decode("utf-8", "surrogateescape")
        return _LONE_BYTES.sub(_hexadecimal, text)

    def _bytes(self, token: int) -> bytes:
        if token not in self._known:
            self._known[token] = self._find_bytes(token)
        return self._known[token]

    def _find_bytes(self, token: int) -> bytes:
        name = str(self._tokenizer.convert_ids_to_tokens(token) or f"<{token}>")
        # Alone, a token of SentencePiece loses the space that it begins with; after another not.
        before, both = self._decode(self._anchor), self._decode([*self._anchor, token])
        text = both.removeprefix(before) if both.startswith(before) else self._decode([token])
        if not text or token in self._special:
            return name.encode()
        if "\ufffd" in text:  # a part of a character, or that sign itself
            if match := _BYTE_NAME.fullmatch(name):
                return bytes.fromhex(match[1])
            found = bytes(_BYTE_OF.get(character, 0) for character in name)
            if found.decode("utf-8", "replace") == text:
                return found
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text


def _hexadecimal(lone: re.Match[str]) -> str:
    found = lone[0].encode("utf-8", "surrogateescape")
    return f"⟨{found.hex().upper()}⟩"
