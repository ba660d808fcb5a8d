"""What the pages for users show: blocks of Python and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser

from softtrace.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    *(f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.md"))),
    *(f"recipes/how-to/{path.name}" for path in sorted((ROOT / "recipes" / "how-to").glob("*.md"))),
)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def command_lines(page: str) -> list[list[str]]:
    """The words of every indented line that begins with ``softtrace``."""
    found = re.findall(r"^(?:    |\$ )softtrace (.*)$", text_of(page), re.MULTILINE)
    return [shlex.split(line) for line in found]


class Parsed(Exception):
    """In place of the command: its parser and what came out."""

    def __init__(self, parser: ArgumentParser, options: Any) -> None:
        self.parser, self.options = parser, options


def parsed(words: Sequence[str]) -> Parsed:
    """Parse a command line by the command's own parser, and stop there."""
    real = ArgumentParser.parse_args

    def parse(self: ArgumentParser, args: Any = None, *others: Any, **options: Any) -> Any:
        raise Parsed(self, real(self, args, *others, **options))

    with patch.object(ArgumentParser, "parse_args", parse):
        try:
            main(list(words))
        except Parsed as end:
            return end
    raise AssertionError(f"softtrace {shlex.join(words)} parsed nothing")
