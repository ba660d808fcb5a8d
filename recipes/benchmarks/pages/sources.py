"""Result files, and the links from a page to what its figures come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.benchmarks.places import RESULTS

#: where recipes/benchmarks lies, seen from README.md, from pages in recipes/, and from the log
README, CARD, LOG = "recipes/benchmarks/", "benchmarks/", ""


def read(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def link(page: str, path: str, shown: str = "") -> str:
    """A link from a page to a file of recipes/benchmarks, by its name."""
    return f"[{shown or Path(path).name}]({page}{path})"


def sources(page: str, *paths: str) -> str:
    """What a figure comes from, in brackets: scripts, and results ``results/...``."""
    return f"({', '.join(link(page, path) for path in paths)})"
