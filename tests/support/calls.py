"""How tests call a command's function: with the words of its command line changed one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from softtrace.evaluation.run_options import RunOptions

CPU = RunOptions(device="cpu")


def changed(words: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A call's words with others in their place, by the flat names that the command line has.

    Args:
        words: parameters of the function, ``source`` and ``run`` among them.
        change: options of the command to other values.
    """
    found = dict(words)
    for name, value in change.items():
        for group in ("source", "run"):
            if name in {field.name for field in fields(found[group])}:
                found[group] = replace(found[group], **{name: value})
                break
        else:
            found[name] = value
    return found
