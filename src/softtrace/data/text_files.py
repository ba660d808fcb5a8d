"""Files to texts: which files of a folder are read, and what a file has to be to be text."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from softtrace.data.rows import Row, read_row
from softtrace.data.tables import parquet_rows
from softtrace.errors import DataError

LARGEST_FILE = 1 << 30
"""Bytes of a plain text file: it is one document, and held whole."""

ALLOWED = (
    "a UTF-8 text file, a .jsonl or .ndjson file (one object with a string 'text', with 'messages' "
    "or with 'prompt' and 'completion' a line), a .json file (a list of such objects, or one a "
    "line), a .parquet file with such columns, or a folder"
)

_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet",)
_CSV = (".csv", ".tsv")
_PACKED = (".arrow", ".feather", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
#: of files that people keep data in, of which a folder's are only read where suffixes name them
UNREAD = (".json", *_CSV, *_PACKED)


def walk(root: Path, suffixes: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    """Relative POSIX paths of the wanted files, in no particular order.

    Capitals make no difference to a suffix, as they make none to how a file is read.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes)

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
            if name.lower().endswith(wanted) and not unwanted(relative, name):
                yield relative


def texts_of(name: str, path: Path) -> Iterable[tuple[str, Row]]:
    """Names and contents of the documents of one file, which was found to be text; no empty ones.

    Args:
        name: of the file; its ending, in capitals or not, says how it is read. A JSONL file's
            documents are ``name:line``, and come one at a time, as those of a Parquet file, which
            are ``name:row``; those of a JSON list are ``name:number``.
        path: where it lies.

    Raises:
        DataError: not a regular file, binary, packed, not UTF-8 or too large; later, malformed
            JSON, a damaged Parquet file, or no library to read it with.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _PACKED:
        raise DataError(
            f"{path}: {suffix} files are not read. Give {ALLOWED}; unpack it, or write its texts "
            "to a .jsonl file first."
        )
    if suffix in _TABLES:
        return of_table(name, f"{path}", parquet_rows(path))
    if suffix in _LINES:
        for _ in _pieces(path):  # found to be text before the first document is handed out
            pass
        return _of_lines(name, path)
    _check_size(path)
    text = "".join(_pieces(path, by_line=False))
    if not text.strip():
        return []
    return _of_json(name, path, text) if suffix == ".json" else [(name, Row(text))]


def refuse_table(path: Path) -> None:
    """Refuse a table that would be read as one text, its separators and all.

    In a folder they are read where suffixes name them.

    Raises:
        DataError: the path ends in .csv or .tsv.
    """
    if path.suffix.lower() in _CSV:
        raise DataError(
            f"{path}: {path.suffix.lower()} files are not read as rows. Write its texts to a "
            ".jsonl file first (pandas: read_csv(...).to_json(..., orient='records', lines=True), "
            "with a column 'text'); to read it as it stands, separators and all, name it .txt."
        )


def of_table(name: str, where: str, rows: Iterable[object]) -> Iterator[tuple[str, Row]]:
    """Names, which are ``name:row``, and contents of the rows of a table that are not empty.

    Raises:
        DataError: see :func:`softtrace.data.rows.read_row`.
    """
    for number, value in enumerate(rows, start=1):
        row = read_row(value, f"{where}, row {number}", _FIX_TABLE)
        if row.text.strip():
            yield f"{name}:{number}", row


def _of_json(name: str, path: Path, text: str) -> Iterator[tuple[str, Row]]:
    """The rows of a list of objects, of one object, or of lines in a file named .json."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("{"):
            raise DataError(f"{path} is not JSON ({error}). {_FIX_JSON}") from error
        yield from _of_lines(name, path)
        return
    rows = [(name, f"{path}", value)]
    if isinstance(value, list):
        rows = [
            (f"{name}:{number}", f"{path}, object {number}", row)
            for number, row in enumerate(value, start=1)
        ]
    for label, where, each in rows:
        row = read_row(each, where, _FIX_JSON)
        if row.text.strip():
            yield label, row


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        return  # reading it will say what is wrong
    if size > LARGEST_FILE:
        raise DataError(
            f"{path} has {size:,} bytes, allowed are {LARGEST_FILE:,}: a plain text file is one "
            "document, which is held whole. Cut it into files of a folder, or write a .jsonl with "
            "one document a line, which is read line by line at any size."
        )


def _of_lines(name: str, path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_pieces(path), start=1):
        if line.strip():
            row = _of_line(line.removesuffix("\n"), f"{path}, line {number}")
            if row.text.strip():
                yield f"{name}:{number}", row


def _pieces(path: Path, by_line: bool = True) -> Iterator[str]:
    """The text of one file, whole or line by line, a byte-order mark removed, line ends kept.

    Lines end at ``\\n`` alone: a JSON string may hold U+2028 and others that str.splitlines sees.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device could block forever
            raise DataError(f"{path} is neither a regular file nor a folder. Give {ALLOWED}.")
        with path.open("rb") as file:
            offset = 0
            for content in file if by_line else (file.read(),):
                text = _decoded(content, path, offset)
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(content)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error


def _decoded(content: bytes, path: Path, offset: int) -> str:
    """UTF-8 to text; ``offset`` of the content in its file, for what an error says."""
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path} is binary (or UTF-16): it has a NUL byte at offset {offset + zero}. "
            f"Give {ALLOWED}; convert other formats first."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
            f"{offset + error.start} ({error.reason}). Only UTF-8 is read; convert it, for example "
            "with 'iconv -f latin1 -t utf-8'."
        ) from error


_FIX_LINES = (
    """Each line must be a JSON object with a string 'text', such as {"text": "..."}, with """
    "'messages', or with 'prompt' and 'completion'."
)
_FIX_JSON = (
    """Give a list of JSON objects with a string 'text', such as [{"text": "..."}], with """
    "'messages', or with 'prompt' and 'completion'; to train on JSON itself, name the file .txt."
)
_FIX_TABLE = "Give it a column 'text' of strings, 'messages', or 'prompt' and 'completion'."


def _of_line(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}). {_FIX_LINES}") from error
    return read_row(value, where, _FIX_LINES)
