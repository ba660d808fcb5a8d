"""Text to blocks: read documents, split them by file, tokenize and pack into equal blocks.

Pure functions over :class:`Document`; the Lightning door is ``softtrace.datamodule``. Blocks of one
length matter here more than elsewhere: the share of edges that a trace needs depends on the length
of the sequence, so densities are only comparable between sequences of equal length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from softtrace.errors import DataError, InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_SUFFIXES = (".py",)
DEFAULT_EXCLUDE = ("site-packages", "dist-packages")
_ALLOWED = "a UTF-8 text file, a .jsonl file (one object with a string 'text' a line) or a folder"
# Characters handed to the tokenizer at once: enough for its threads, and little enough that the
# Python lists of ids (some 36 bytes a token) stay small next to the resulting tensor.
_CHARACTERS_PER_CALL = 4_000_000


class Document(NamedTuple):
    """One text, and the name that decides its side of the split: relative path or ``file:line``."""

    name: str
    text: str


def read_documents(
    path: str | os.PathLike[str],
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> list[Document]:
    """Read the documents of a text file, a ``.jsonl`` file or a folder.

    A folder is walked without following links to folders; ``__pycache__`` and hidden files and
    folders are left out. Files of a folder that are not UTF-8 text are skipped and counted in one
    logged warning, since a large tree (Python's own library) has a few on purpose; a file named
    directly must be text. Empty texts are dropped.

    Args:
        path: file or folder. A file's own suffix only matters when it is ``.jsonl``.
        suffixes: for a folder, the file suffixes to read, such as ``(".py", ".md", ".txt")``.
        exclude: for a folder, globs that drop a file or folder when they match its bare name or its
            path relative to ``path`` (``"test"``, ``"*_pb2.py"``, ``"lib2to3/tests/*"``).

    Returns:
        Documents sorted by relative POSIX path, then by line. Names are relative to ``path`` and so
        do not depend on where the tree lies.

    Raises:
        DataError: nothing there, nothing readable, binary, not UTF-8, or a malformed JSONL line.
        InvalidInputError: suffixes or globs of the wrong form.
    """
    _check_patterns(suffixes, exclude)
    root = Path(path)
    if root.is_dir():
        return _read_tree(root, suffixes, exclude)
    if not root.exists():
        raise DataError(f"no such file or folder: {root}. Give the path of {_ALLOWED}.")
    documents = _parse(root.name, _read_text(root), where=str(root))
    if not documents:
        raise DataError(f"{root} holds no text. Give the path of {_ALLOWED} that is not empty.")
    return documents


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


def _read_tree(root: Path, suffixes: Sequence[str], exclude: Sequence[str]) -> list[Document]:
    documents: list[Document] = []
    skipped: list[str] = []
    names = sorted(_walk(root, suffixes, exclude))
    for name in names:
        try:
            text = _read_text(root / name)
        except DataError as error:
            skipped.append(str(error))
            continue
        documents += _parse(name, text, where=str(root / name))
    if skipped:
        logger.warning(
            "skipped %d of %d files under %s that are not readable UTF-8 text; the first: %s",
            len(skipped), len(names), root, skipped[0],
        )  # fmt: skip
    if not documents:
        found = f"{len(names)} such files, {len(skipped)} of them unreadable, the rest empty"
        raise DataError(
            f"the folder {root} gives no text: {found if names else 'no file'} with a suffix in "
            f"{list(suffixes)} outside of hidden folders and {list(exclude)}. "
            "Check the path, or give other suffixes or exclude globs."
        )
    return documents


def _walk(root: Path, suffixes: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    """Relative POSIX paths of the wanted files, in no particular order."""

    def unwanted(relative: str, name: str) -> bool:
        if name.startswith(".") or name == "__pycache__":
            return True
        return any(fnmatchcase(relative, glob) or fnmatchcase(name, glob) for glob in exclude)

    for folder, folders, files in os.walk(root):
        prefix = Path(folder).relative_to(root)
        # os.walk descends into what is left in this list.
        folders[:] = [name for name in folders if not unwanted((prefix / name).as_posix(), name)]
        for name in files:
            relative = (prefix / name).as_posix()
            if name.endswith(tuple(suffixes)) and not unwanted(relative, name):
                yield relative


def _read_text(path: Path) -> str:
    """The text of one file, a byte-order mark removed and line ends as they are."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device could block forever
            raise DataError(f"{path} is neither a regular file nor a folder. Give {_ALLOWED}.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path} is binary (or UTF-16): it has a NUL byte at offset {zero}. "
            f"Give {_ALLOWED}; convert other formats first."
        )
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} "
            f"({error.reason}). Only UTF-8 is read; convert it, for example with "
            "'iconv -f latin1 -t utf-8'."
        ) from error


def _parse(name: str, text: str, where: str) -> list[Document]:
    if not name.endswith(".jsonl"):
        return [Document(name, text)] if text.strip() else []
    documents = []
    # Not splitlines(): a JSON string may hold U+2028 and other characters that it breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            content = _jsonl_text(line, f"{where}, line {number}")
            if content.strip():
                documents.append(Document(f"{name}:{number}", content))
    return documents


def _jsonl_text(line: str, where: str) -> str:
    fix = """Each line must be a JSON object with a string 'text', such as {"text": "..."}."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}). {fix}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__}. {fix}")
    text = value.get("text")
    if not isinstance(text, str):
        found = f"of type {type(text).__name__}" if "text" in value else "missing"
        raise DataError(f"{where}: 'text' is {found}; the keys are {list(value)[:8]}. {fix}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'text' has half a surrogate pair ({error}). {fix}") from error
    return text


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
    added to the name.

    With few documents one side may come out empty, since making it otherwise would have to look at
    the other documents; check for it.

    Args:
        documents: what :func:`read_documents` returned.
        held_out_share: expected share of documents (of characters, for one document), in [0, 1).
        salt: another salt gives another split.

    Returns:
        ``(train, held_out)``, each in the order of ``documents``.

    Raises:
        InvalidInputError: the share is not in [0, 1).
        DataError: a single document of a single line, with a share above 0.
    """
    if not 0 <= held_out_share < 1:
        raise InvalidInputError(
            f"held_out_share is {held_out_share}, but must be in [0, 1): 0.05 holds out 5 %, and 0 "
            "nothing."
        )
    if held_out_share == 0:
        return list(documents), []
    if len(documents) == 1:
        return _split_tail(documents[0], held_out_share)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[held_out(document.name, held_out_share, salt)].append(document)
    return sides


def _split_tail(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    name, text = document
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
            head = Document(f"{name} (head)", text[:cut])
            return [head], [Document(f"{name} (tail)", text[cut:])]
    raise DataError(
        f"{name} is a single document of a single line, so no part of it can be held out. "
        "Give more documents (a folder or a JSONL file), text with line breaks, or "
        "held_out_share=0."
    )


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids of all documents in a row, the end-of-sequence token between each two.

    Special tokens spelled out in a text are encoded as the plain characters they are there, so that
    only real borders look like borders.

    Returns:
        ``[tokens]`` int64 on the CPU.

    Raises:
        DataError: no documents, or the tokenizer has no end-of-sequence token.
    """
    if not documents:
        raise DataError("there are no documents to encode. Check the path and the held-out share.")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "the tokenizer has no end-of-sequence token to put between documents. Set one, such as "
            "tokenizer.eos_token = '<|endoftext|>', and save the tokenizer."
        )
    pieces: list[Tensor] = []
    separator = torch.tensor([end])
    for texts in _portions([document.text for document in documents]):
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # or it warns of every document that is longer than the model's context
        )
        for ids in encoded["input_ids"]:
            pieces += [torch.tensor(ids, dtype=torch.int64), separator]
    return torch.cat(pieces[:-1])


def _portions(texts: list[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_CALL:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Tensor:
    """Encode the documents and cut the row of tokens into full blocks, dropping the remainder.

    Args:
        documents: at least one.
        tokenizer: with an end-of-sequence token.
        block_size: tokens in a block, at least 2 (the first has nothing to be predicted from).

    Returns:
        ``[N, block_size]`` int64, N >= 1.

    Raises:
        DataError: not one full block, or what :func:`encode` refuses.
        InvalidInputError: the block size is below 2.
    """
    if block_size < 2:
        raise InvalidInputError(f"block_size is {block_size}, but must be at least 2 tokens.")
    tokens = encode(documents, tokenizer)
    blocks = len(tokens) // block_size
    if blocks == 0:
        raise DataError(
            f"{len(documents)} documents give {len(tokens)} tokens, less than one block of "
            f"{block_size}. Give more text, or a block_size of at most {len(tokens)}."
        )
    return tokens[: blocks * block_size].view(blocks, block_size)


def evenly(blocks: Tensor, count: int) -> Tensor:
    """``count`` blocks evenly spaced over all, or all if there are fewer."""
    if len(blocks) <= count:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]
