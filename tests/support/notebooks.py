"""Notebooks run in this process, cell by cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from recipes.benchmarks.pages.notebooks import code_of

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "notebooks"


def run(name: str, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    """Run all cells in the notebook's folder, with other values in place of its first cell's."""
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(plt, "show", lambda: None)
    first, *others = code_of(FOLDER / name)
    namespace: dict[str, Any] = {}
    exec(compile(first, name, "exec"), namespace)
    assert set(changed) <= set(namespace)
    namespace |= changed
    for code in others:
        exec(compile(code, name, "exec"), namespace)
    plt.close("all")
    return namespace
