"""What a token says inside of a text, which is not always what it says alone."""

from __future__ import annotations

from typing import Any


class TokenText:
    """The text of single tokens, such that texts of tokens in a row add up to the text.

    Alone, many tokenizers (those of SentencePiece) drop the space that a token begins with; after
    another token they do not. A part of a character, or a token without text, goes by its name in
    the vocabulary.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def __call__(self, token: int) -> str:
        """The text of the token with this id."""
        before, both = self._decode(self._anchor), self._decode([*self._anchor, token])
        text = both.removeprefix(before) if both.startswith(before) else self._decode([token])
        if text and "\ufffd" not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens(token) or f"<{token}>")

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text
