"""Commands that name a benchmark name one that is there, and benchmarks stand on no test."""

from __future__ import annotations

import re
from importlib.util import find_spec

from recipes.benchmarks.places import ROOT

RECIPES = ROOT / "recipes"
SHOWN = ("Makefile", "README.md", "CONTRIBUTING.md", "tests/support/mutations.py")


def test_modules_that_are_shown_are_there() -> None:
    pages = [*(ROOT / name for name in SHOWN), *RECIPES.rglob("*.md"), *RECIPES.rglob("*.py")]
    found = {
        name
        for page in pages
        for name in re.findall(r"(?:-m |P=)(recipes[\w.]+\w)", page.read_text(encoding="utf-8"))
    }
    assert len(found) >= 12
    for name in found:
        assert find_spec(name) is not None, name


def test_no_script_imports_a_test() -> None:
    for path in RECIPES.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
        assert not [line for line in imports if re.search(r"\btest_\w+", line)], path
