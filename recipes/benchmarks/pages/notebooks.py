"""Notebooks as what they are made of: code to run, and a page of Markdown to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def code_of(path: Path) -> list[str]:
    """The code cells of a notebook, first to last."""
    return ["".join(cell["source"]) for cell in _cells(path) if cell["cell_type"] == "code"]


def as_markdown(path: Path) -> str:
    """A page that shows a notebook: its text, its code, and the outputs that are stored in it."""
    parts: list[str] = []
    for cell in _cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts += map(_shown, cell["outputs"])
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """An output of a cell: a picture if it is one, otherwise text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output of the cell above](data:image/png;base64,{data['image/png'].strip()})"
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


def _cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found
