"""Texts that real models are trained on and measured on, in ``on_real_models.py``."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from softtrace.data import Document, read_documents, split_by_file

TEXTS = ("prose", "python", "chat")
_LONG = 40  # characters of a line that two texts hardly share by chance
_FEW = 0.1  # of the held-out lines, which any two manuals of one system share


def documents(text: str, prose: Path) -> tuple[list[Document], list[Document]]:
    """The training and the held-out side of a text."""
    if text == "prose":
        held_out = read_documents(prose / "held_out.jsonl")
        return without_copies(read_documents(prose / "train.jsonl"), held_out), held_out
    packages = Path(sysconfig.get_paths()["purelib"])
    source = [
        document
        for name in ("torch", "matplotlib", "transformers")
        for document in read_documents(packages / name, (".py",))
    ]
    sides = split_by_file(source, 0.08, "softtrace")
    return sides if text == "python" else (_chats(sides[0]), _chats(sides[1]))


def _chats(source: list[Document]) -> list[Document]:
    """A conversation a documented function: its docstring is asked for, its code is the answer."""
    found = []
    for document in source:
        for node in _functions(str(document.text)):
            said, body = ast.get_docstring(node), ast.unparse(node)
            if said and 40 < len(said) < 1500 and len(body) < 4000:
                node.body = node.body[1:] or [ast.Pass()]
                asked = f"Write the Python function `{node.name}`.\n\n{said}"
                answer = f"```python\n{ast.unparse(node)}\n```"
                turns = [("user", asked), ("assistant", answer)]
                messages = [{"role": role, "content": content} for role, content in turns]
                text = json.dumps({"messages": messages})
                found.append(Document(f"{document.name}:{node.name}", text, rendered=True))
    return found


def _functions(source: str) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def without_copies(train: list[Document], held_out: list[Document]) -> list[Document]:
    """The training side without documents half of whose long lines are held out, or more.

    A corpus may hold several versions of one document, as packaged documentation does, and a split
    by file then puts them on both sides: what is called held out was learned by heart.
    """
    known = {line for document in held_out for line in _long_lines(document)}
    kept = []
    for document in train:
        lines = _long_lines(document)
        if 2 * sum(line in known for line in lines) < len(lines) or not lines:
            kept.append(document)
    return kept


def copied(train: list[Document], held_out: list[Document]) -> float:
    """Share of the held-out side's long lines that the training side has too."""
    known = {line for document in train for line in _long_lines(document)}
    there = [line in known for document in held_out for line in _long_lines(document)]
    return sum(there) / max(1, len(there))


def _long_lines(document: Document) -> list[str]:
    lines = (line.strip() for line in str(document.text).splitlines())
    return [line for line in lines if len(line) > _LONG]


def copied_of(blocks: Path) -> float:
    """Share of the held-out lines that training had when this file of blocks was made.

    Raises:
        SystemExit: the file does not say, so it may be one of before copies were left out.
    """
    with safe_open(blocks, "pt") as file:
        said = file.metadata() or {}
    if "copied" not in said:
        raise SystemExit(f"{blocks.name} does not say what it has copied: make its tokens anew")
    return float(said["copied"])


def has_copies(row: dict[str, Any]) -> bool:
    """Whether the training of a row of results saw other versions of what was held out.

    Runs that do not say were made while it had 72 % of the prose's held-out lines.
    """
    return row["text"] == "prose" and (row["copied"] is None or row["copied"] > _FEW)


def digest(tokens: dict[str, Tensor]) -> str:
    """Tells blocks of one text from those of another: a corpus may have grown between two runs."""
    seen = hashlib.sha256(tokens["train"].numpy().tobytes())
    seen.update(tokens["held_out"].numpy().tobytes())
    return seen.hexdigest()[:12]
