"""Parts of a Markdown page that are written by a program, between markers; the rest is people's."""

from __future__ import annotations

import re

from softtrace.errors import DataError


def line_end(text: str) -> str:
    """How the lines of a page end: CRLF if any does."""
    return "\r\n" if "\r\n" in text else "\n"


def with_section(text: str, name: str, body: str, *, add: bool = True) -> str:
    """A page with what stands between ``<!-- name -->`` and ``<!-- /name -->`` replaced.

    Args:
        text: the page; its line ends are kept.
        name: of the section.
        body: what shall stand there.
        add: put the section at the end of a page that has none.

    Raises:
        DataError: the markers are there more than once, one without the other, or, without
            ``add``, not at all.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    counts = text.count(begin), text.count(end)
    line = line_end(text)
    block = line.join([begin, *body.splitlines(), end])
    if counts == (0, 0) and add:
        return f"{text.rstrip()}{line * 2}{block}{line}" if text.strip() else f"{block}{line}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found, replaced = pattern.subn(lambda _: block, text)
    if counts != (1, 1) or replaced != 1:
        raise DataError(
            f"found {counts[0]} of {begin} and {counts[1]} of {end}, expected each once, in this "
            "order; repair or remove the section"
        )
    return found
