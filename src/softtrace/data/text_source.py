"""Which text a command reads: a path, what of a folder counts, and the side of a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from softtrace.data.documents import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    SpecialTokens,
    stream_documents,
    stream_held_out,
)
from softtrace.errors import DataError


@dataclass(frozen=True)
class TextSource:
    """A text, or the side of it that a split holds out.

    The attributes are options of every command that reads a text, and this is what ``--help`` says
    of them.

    Attributes:
        data: Text file, file of rows (.jsonl, .json, .parquet) or folder that is read, or data set
            of the hub (hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]). A row holds text, messages
            (written out by the model's chat template), or prompt and completion; all of its
            tokens are measured.
        held_out_share: Only the files that a split with this share and salt holds out are read; at
            0 all of them are.
        salt: Salt of the split. It has to be that of the training run.
        suffixes: Suffixes of the files of a folder that are read.
        exclude: Globs of files or folders that are left out.
        special_tokens: How special tokens that are spelled out in a text are read: as tokens, as
            what a chat template rendered is to be read, or as plain characters. With auto they
            are tokens in a text that begins or ends with one, and characters in any other. Those
            of a chat template are always tokens.
    """

    data: str
    held_out_share: float = 0.0
    salt: str = ""
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    special_tokens: SpecialTokens = "auto"

    @property
    def split(self) -> str:
        """Which side of the split is read, as result files say it."""
        return f"held out, share {self.held_out_share:g}" if self.held_out_share else "all"

    def stream_all(self) -> Iterator[Document]:
        """The documents of both sides of the split, one at a time."""
        return stream_documents(self.data, self.suffixes, self.exclude, self.special_tokens)

    def stream(self) -> Iterator[Document]:
        """The documents that the split holds out, or all at a share of 0, one at a time.

        Raises:
            DataError: text that cannot be read, or none is held out.
        """
        documents = self.stream_all()
        if not self.held_out_share:
            yield from documents
            return
        found = False
        for document in stream_held_out(documents, self.held_out_share, self.salt):
            found = True
            yield document
        if not found:
            raise DataError(
                f"{self.data}: no file is held out at a share of {self.held_out_share:g}; give "
                "more files, another share or salt, or held_out_share=0 to take all of them"
            )

    def documents(self) -> list[Document]:
        """What :meth:`stream` yields, at once."""
        return list(self.stream())
