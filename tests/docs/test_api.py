"""What the API page shows of docstrings: phrases that begin and end as sentences do."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import griffe

from tests.docs.pages import PAGES, python_blocks, text_of

OPTIONS: Any = {
    "warn_unknown_params": False, "warn_missing_types": False, "warnings": False,
    "returns_multiple_items": False, "returns_named_value": False,
}  # fmt: skip


def shown() -> Iterator[Any]:
    """Everything on the page: functions, classes, and their public methods."""
    blocks = re.findall(r"^::: (\S+)(.*?)(?=^[#:]|\Z)", text_of("recipes/api.md"), re.S | re.M)
    for module, members in blocks:
        known = importlib.import_module(module)
        named = re.findall(r"[A-Za-z_]\w+", members.partition("members:")[2])
        for name in named or [n for n, o in vars(known).items() if inspect.isclass(o)]:
            yield (each := getattr(known, name))
            if inspect.isclass(each):
                yield from (o for n, o in vars(each).items() if n[0] != "_" and callable(o))


def test_entries_begin_and_end_as_sentences_do() -> None:
    checked = 0
    for each in shown():
        for section in griffe.Docstring(inspect.getdoc(each) or "").parse("google", **OPTIONS):
            entries = section.value if isinstance(section.value, list) else []
            if section.kind.value == "returns":  # what stands before a colon is read as a type
                assert " " not in str(entries[0].annotation or ""), each
            for entry in entries:
                said = getattr(entry, "description", "")  # an example's line has none
                if said:
                    checked += 1
                    assert not said[0].islower(), (each, said)
                    assert said.endswith((".", "``", "|")), (each, said)
    assert checked > 150


def test_pages_use_what_is_on_it() -> None:
    used: set[str] = set()
    for block in (block for page in PAGES for block in python_blocks(page)):
        used.update(re.findall(r"\bsofttrace\.(\w+)\(", block))
        for names in re.findall(r"^from softtrace[\w.]* import (.+)$", block, re.M):
            used.update(re.findall(r"\w+", names))
    assert "StaticDecoder" in used
    assert "load_exit_maps" in used
    assert not used - {each.__name__ for each in shown()}
