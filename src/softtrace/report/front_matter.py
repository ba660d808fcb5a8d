"""The YAML at the top of a model's README.md: added to, with what people wrote left as it is.

Nothing is parsed and written anew: comments, quotes, ``1.10`` and folded text would not survive.
Keys and a tag are put into the text itself, and only where the YAML then reads as it should.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from softtrace.errors import DataError
from softtrace.report.sections import line_end

_END = r"(?:\r\n|\r|\n)"
_OPENING = re.compile(rf"\s*---[ \t]*{_END}")
# YAML also ends a document by "...", which the hub does not read but other programs do.
_CLOSING = re.compile(rf"(?<=[\r\n])(?:---|\.\.\.)[ \t]*(?:{_END}|\Z)")
_DASH = re.compile(r"[ \t]*(?=-[ \t])")


def with_metadata(text: str, metadata: Mapping[str, str], tag: str) -> tuple[str, str]:
    """A page's front matter with what is missing in it, and the rest of the page.

    Keys that are there stay, whatever they say; missing ones come behind them. Where the text
    cannot be added to safely (a mapping in braces, a list that is shared by an alias, ...) it stays
    as it is. A page without front matter gets one.

    Args:
        text: the page; its line ends are kept.
        metadata: keys and what they say if they are missing.
        tag: one that ``tags`` should hold.

    Returns:
        Front matter with its marks and the line end behind them, and the page after it, as it was.

    Raises:
        DataError: the front matter is no YAML, or not what a model card may say.
    """
    line = line_end(text)
    opening = _OPENING.match(text)
    closing = None if opening is None else _CLOSING.search(text, opening.end())
    if opening is None or closing is None:
        said: dict[str, Any] = {**metadata, "tags": [tag]}
        made = ModelCardData(**said).to_yaml(line_break=line)
        return f"---{line}{made}{line}---{line}", text
    written = text[opening.end() : closing.start()]
    try:
        ModelCard(f"---\n{written}\n---\n")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(
            f"its front matter is no model card's ({error}); repair it, or remove it"
        ) from error
    written = _with_keys(_with_tag(written, tag, line), {**metadata, "tags": [tag]}, line)
    end = closing[0] if closing[0].endswith(("\r", "\n")) else closing[0] + line
    return opening[0] + written + end, text[closing.end() :]


def _with_tag(written: str, tag: str, line: str) -> str:
    """The YAML with the tag behind the others of its list, if there is one without it."""
    found = yaml.safe_load(written) or {}
    tags = found.get("tags")
    if not isinstance(tags, list) or tag in tags:
        return written
    root: Any = yaml.compose(written, Loader=yaml.SafeLoader)
    node = next((value for key, value in root.value if key.value == "tags"), None)
    if node is None:  # the list comes from a merge key
        return written
    if not node.value:
        at, piece = node.end_mark.index - 1, tag
    elif node.flow_style:
        at, piece = node.value[-1].end_mark.index, f", {tag}"
    else:
        last = node.value[-1]
        dash = _DASH.match(written, last.start_mark.index - last.start_mark.column)
        if dash is None:
            return written
        at = last.end_mark.index
        at += len(re.match(r"[^\r\n]*", written[at:])[0])  # type: ignore[index]
        piece = f"{line}{dash[0]}- {tag}"
    added = f"{written[:at]}{piece}{written[at:]}"
    return added if _reads(added, {**found, "tags": [*tags, tag]}) else written


def _with_keys(written: str, metadata: Mapping[str, Any], line: str) -> str:
    """The YAML with those keys at its end that it lacks."""
    found = yaml.safe_load(written) or {}
    missing = {key: value for key, value in metadata.items() if key not in found}
    if not missing:
        return written
    root = yaml.compose(written, Loader=yaml.SafeLoader)
    indent = " " * (0 if root is None else root.start_mark.column)
    dumped = yaml.safe_dump(missing, sort_keys=False, allow_unicode=True, width=float("inf"))
    added = written + "".join(f"{indent}{row}{line}" for row in dumped.splitlines())
    return added if _reads(added, {**found, **missing}) else written


def _reads(written: str, expected: object) -> bool:
    try:
        return bool(yaml.safe_load(written) == expected)
    except yaml.YAMLError:
        return False
