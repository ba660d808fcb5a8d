"""Sections of a page that programs write; the rest stays as people wrote it."""

from __future__ import annotations

import pytest

from softtrace.errors import DataError
from softtrace.report.sections import with_section


def test_a_section_is_added_once_and_then_replaced() -> None:
    page = with_section("# Mine\n\nText.\n", "part", "one\ntwo")
    assert page == "# Mine\n\nText.\n\n<!-- part -->\none\ntwo\n<!-- /part -->\n"
    page = with_section(page + "\nAfter it.", "part", r"\1 is no group")
    assert page == (
        "# Mine\n\nText.\n\n<!-- part -->\n\\1 is no group\n<!-- /part -->\n\nAfter it."
    )
    assert with_section("", "part", "one") == "<!-- part -->\none\n<!-- /part -->\n"


def test_other_sections_and_line_ends_are_kept() -> None:
    page = with_section(with_section("Text.\r\n", "a", "1\n2"), "b", "3")
    assert page == (
        "Text.\r\n\r\n<!-- a -->\r\n1\r\n2\r\n<!-- /a -->\r\n\r\n<!-- b -->\r\n3\r\n<!-- /b -->\r\n"
    )
    assert with_section(page, "a", "4").count("\n") == page.count("\n") - 1


@pytest.mark.parametrize(
    "page",
    [
        "<!-- part -->\n",
        "<!-- /part -->\n",
        "<!-- /part --> <!-- part -->",
        "<!-- part --><!-- /part --><!-- part --><!-- /part -->",
    ],
)
def test_damaged_markers_are_named(page: str) -> None:
    with pytest.raises(DataError, match=r"of <!-- part --> .*expected each once"):
        with_section(page, "part", "one")


def test_a_missing_section_is_an_error_where_one_is_expected() -> None:
    with pytest.raises(DataError, match="found 0 of <!-- part -->"):
        with_section("Text.", "part", "one", add=False)
