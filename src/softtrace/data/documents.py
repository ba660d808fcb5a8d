"""Texts as documents: read them, and split them by file.

Pure functions over :class:`Document`; that of Lightning is ``softtrace.lightning.datamodule``.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from softtrace.checks import check_choice, check_range, refuse_empty
from softtrace.data.rows import Row
from softtrace.data.tables import HUB_FORM, hub_dataset
from softtrace.data.text_files import ALLOWED, UNREAD, of_table, refuse_table, texts_of, walk
from softtrace.errors import DataError, InvalidInputError

logger = logging.getLogger(__name__)

DEFAULT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html",  # prose
    ".jsonl", ".ndjson", ".parquet",  # rows of data; .json has to be named, as it may be settings
    ".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".cs", ".go", ".java", ".js", ".jsx", ".kt", ".lua",
    ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
)  # fmt: skip
DEFAULT_EXCLUDE = ("site-packages", "dist-packages")


SpecialTokens = Literal["auto", "characters", "tokens"]
"""How special tokens that are spelled out in a text are read, see :class:`Document`."""


class Document(NamedTuple):
    """One text, and how it is read.

    Attributes:
        name: relative path, ``file:line`` or ``file:row``, which decides the side of a split.
        text: what is tokenized; or, where it is rendered, JSON of what is rendered.
        special_tokens: what ``<|im_start|>`` and the like in the text are: ``"tokens"``, as in what
            a chat template rendered; ``"characters"``, as in a text that speaks of them; or
            ``"auto"``, tokens where the text begins or ends with one, and characters elsewhere.
            Those that a chat template writes are always tokens.
        rendered: whether the text is JSON of ``messages``, or of ``prompt`` and ``completion``,
            which is rendered when it is tokenized.
    """

    name: str
    text: str
    special_tokens: SpecialTokens = "auto"
    rendered: bool = False


def read_documents(
    path: str | os.PathLike[str],
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    special_tokens: SpecialTokens = "auto",
) -> list[Document]:
    """Read the documents of a text file, a file of rows, a folder or a data set of the hub.

    Rows are the lines of a ``.jsonl`` or ``.ndjson`` file, the objects of a ``.json`` file and the
    rows of a ``.parquet`` file. Each is one document: of ``messages`` (a conversation, which the
    model's chat template renders; also ``conversations``, with ``from`` and ``value``), of
    ``prompt`` and ``completion`` (two strings, or two lists of messages) or of a string ``text``,
    in this order where a row has several. ``tools``, ``system`` and ``chat_template_kwargs`` go to
    the template.

    A folder is walked without following links to folders; ``__pycache__`` and hidden files and
    folders are left out. Files of a folder that are not UTF-8 text are skipped and counted in one
    logged warning, since a large tree (Python's own library) has a few on purpose; a file named
    directly must be text. Empty texts are dropped.

    Args:
        path: File or folder, or ``hf://datasets/OWNER/NAME[/CONFIG][:SPLIT]`` (the split
            ``train`` where none is named). Of a single file the suffix only matters where it is one
            of rows, or of what is not read (``.gz``, ``.csv``). Parquet and the hub take the extra
            ``softtrace[data]``.
        suffixes: File suffixes to read in a folder, such as ``(".py", ".md", ".txt")``.
        exclude: Globs that drop a file or folder when they match its bare name or its path relative
            to ``path`` (``"test"``, ``"*_pb2.py"``, ``"lib2to3/tests/*"``).
        special_tokens: How special tokens that are spelled out in a text are read, see
            :class:`Document`.

    Returns:
        Documents sorted by relative POSIX path, then by line. Names are relative to ``path`` and so
        do not depend on where the tree lies.

    Raises:
        DataError: There is nothing to read, it is binary or not UTF-8, rows are malformed or
            unknown, or the library to read them with is missing.
        InvalidInputError: Suffixes or globs have the wrong form.
    """
    return list(stream_documents(path, suffixes, exclude, special_tokens))


def stream_documents(
    path: str | os.PathLike[str],
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    special_tokens: SpecialTokens = "auto",
) -> Iterator[Document]:
    """:func:`read_documents` one at a time: memory holds one file, or one line of a JSONL file.

    What is wrong is raised where reading meets it; JSONL files are read once before, to be known as
    text.
    """
    _check_patterns(suffixes, exclude)
    check_choice("special_tokens", special_tokens, get_args(SpecialTokens))
    refuse_empty("data", path, f"the path of {ALLOWED} ('.' for this folder)", DataError)
    root, hub = Path(path), hub_dataset(path)
    if hub is not None:
        texts: Iterable[tuple[str, Row]] = of_table(hub.label, f"{path}", hub.rows())
    elif root.is_dir():
        yield from _read_tree(root, suffixes, exclude, special_tokens)
        return
    elif not root.exists():
        raise DataError(
            f"no such file or folder: {root}. Give the path of {ALLOWED}; a data set of the hub is "
            f"written {HUB_FORM}."
        )
    else:
        refuse_table(root)
        texts = texts_of(root.name, root)
    found = False
    for name, row in texts:
        found = True
        yield Document(name, row.text, special_tokens, row.rendered)
    if not found:
        raise DataError(f"{path} holds no text. Give the path of {ALLOWED} that is not empty.")


def _check_patterns(suffixes: Sequence[str], exclude: Sequence[str]) -> None:
    for name, value in (("suffixes", suffixes), ("exclude", exclude)):
        if isinstance(value, str):
            raise InvalidInputError(
                f"{name} is the string {value!r}, but must be a list of strings: write [{value!r}]."
            )
    wrong = [suffix for suffix in suffixes if not suffix.startswith(".")]
    if wrong or not suffixes:
        raise InvalidInputError(
            f"suffixes are {list(suffixes)}; give at least one, each with its dot, such as '.py'."
        )


def _read_tree(
    root: Path, suffixes: Sequence[str], exclude: Sequence[str], special_tokens: SpecialTokens
) -> Iterator[Document]:
    found = False
    skipped: list[str] = []
    names = sorted(walk(root, suffixes, exclude))
    if tuple(suffixes) == DEFAULT_SUFFIXES and (left := sorted(walk(root, UNREAD, exclude))):
        logger.warning(
            "%d files under %s that may hold data are not read, such as %s; give suffixes to read "
            "them, or exclude globs to leave them out without this notice",
            len(left), root, left[0],
        )  # fmt: skip
    for name in names:
        try:
            texts = texts_of(name, root / name)
        except DataError as error:
            skipped.append(str(error))
            continue
        for text_name, row in texts:
            found = True
            yield Document(text_name, row.text, special_tokens, row.rendered)
    if skipped:
        logger.warning(
            "skipped %d of %d files under %s that are not readable UTF-8 text; the first: %s",
            len(skipped), len(names), root, skipped[0],
        )  # fmt: skip
    if not found:
        seen = f"{len(names)} such files, {len(skipped)} of them unreadable, the rest empty"
        raise DataError(
            f"the folder {root} gives no text: {seen if names else 'no file'} with a suffix in "
            f"{list(suffixes)} outside of hidden folders and {list(exclude)}. "
            "Check the path, or give other suffixes or exclude globs."
        )


def held_out(name: str, share: float, salt: str) -> bool:
    """Whether the document of this name is held out: its hash, read as a number in [0, 1), < share.

    A function of the name alone: other files never move it, and a larger share only adds files.
    """
    digest = hashlib.sha256((salt + name).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_by_file(
    documents: Sequence[Document], held_out_share: float, salt: str = ""
) -> tuple[list[Document], list[Document]]:
    """Split documents by :func:`held_out` of their names: files of a folder, lines of a JSONL file.

    A single document cannot be split by name. Its tail is held out instead, cut where a paragraph
    ends (else a line) next to the wanted share; head and tail get ``" (head)"`` and ``" (tail)"``
    added to the name. A single row that is rendered cannot be cut.

    With few documents one side may come out empty, since making it otherwise would have to look at
    the other documents; check for it.

    Args:
        documents: What :func:`read_documents` returned.
        held_out_share: Expected share of documents (of characters, for one document), in [0, 1).
        salt: Another salt gives another split.

    Returns:
        ``(train, held_out)``, each in the order of ``documents``.

    Raises:
        InvalidInputError: The share is not in [0, 1).
        DataError: A single document of a single line, or a single conversation, with a share above
            0.
    """
    check_share(held_out_share)
    if held_out_share == 0:
        return list(documents), []
    if len(documents) == 1:
        return _split_tail(documents[0], held_out_share)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[held_out(document.name, held_out_share, salt)].append(document)
    return sides


def check_share(held_out_share: float) -> None:
    """Raise :class:`InvalidInputError` where the share that is held out is not in [0, 1)."""
    check_range("held_out_share", held_out_share, 0, 1, open_high=True)


def stream_held_out(
    documents: Iterable[Document], held_out_share: float, salt: str = ""
) -> Iterator[Document]:
    """The held-out side of :func:`split_by_file`, one document at a time."""
    check_share(held_out_share)
    rest = iter(documents)
    begin = list(islice(rest, 2))
    if len(begin) < 2:
        yield from split_by_file(begin, held_out_share, salt)[1]
        return
    for document in chain(begin, rest):
        if held_out(document.name, held_out_share, salt):
            yield document


def _split_tail(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    name, text = document.name, document.text
    if document.rendered:
        raise DataError(
            f"{name} is the only row, and a conversation or a prompt with its completion is not "
            "cut, so no part of it can be held out. Give more rows, or held_out_share=0 (not to "
            "softtrace study, which needs both sides)."
        )
    wanted = round(len(text) * (1 - share))
    # A paragraph's end may move the cut by half of the tail at most; a line's end by any distance.
    for boundary, reach in (("\n\n", (len(text) - wanted) // 2), ("\n", len(text))):
        before = text.rfind(boundary, 0, wanted)
        after = text.find(boundary, max(wanted - len(boundary), 0))
        cuts = [
            cut
            for cut in (found + len(boundary) for found in (before, after) if found >= 0)
            if abs(cut - wanted) <= reach and text[:cut].strip() and text[cut:].strip()
        ]
        if cuts:
            cut = min(cuts, key=lambda cut: abs(cut - wanted))
            head, tail = (
                document._replace(name=f"{name} ({side})", text=part)
                for side, part in (("head", text[:cut]), ("tail", text[cut:]))
            )
            return [head], [tail]
    raise DataError(
        f"{name} is a single document of a single line, so no part of it can be held out. "
        "Give more documents (a folder or a JSONL file), text with line breaks, or "
        "held_out_share=0 (not to softtrace study, which needs both sides)."
    )
