"""Shares are written in one way: a number, a space and the sign."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import softtrace
from softtrace.percent import brief_percent, percent

HOUSE = Path(softtrace.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md")]


@pytest.mark.parametrize(
    ("share", "decimals", "signed", "said"),
    [
        (0.756, None, False, "75.6 %"),
        (0.07103, None, False, "7.10 %"),
        (0.00012, None, False, "0.0120 %"),
        (0.0, None, False, "0.0 %"),
        (-0.125, None, False, "-12.5 %"),
        (-0.0749, None, False, "-7.49 %"),
        (0.756, 0, False, "76 %"),
        (0.0064, 2, True, "+0.64 %"),
        (-0.0064, 2, True, "-0.64 %"),
    ],
)
def test_a_share_in_words(share: float, decimals: int | None, signed: bool, said: str) -> None:
    assert percent(share, decimals, signed=signed) == said


def test_numbers_that_someone_chose_have_no_zeros_behind() -> None:
    assert [brief_percent(share) for share in (1, 0.95, 0.07, 1e-4)] == [
        "100 %", "95 %", "7 %", "0.01 %"
    ]  # fmt: skip


def formats_of_their_own(source: str) -> list[str]:
    """Formats of Python that write per cent without a space, in f-strings and for str.format."""
    texts = [
        str(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [text for text in texts if re.search(r"(^|:)[+<>]?\d*\.\d%(\}|$)", text)]


def test_no_code_writes_per_cent_in_a_way_of_its_own() -> None:
    assert formats_of_their_own('f"{share:9.1%} of them"')
    assert formats_of_their_own('"{:+.2%}".format(share)')
    for folder in (HOUSE, ROOT / "recipes"):
        for path in folder.rglob("*.py"):
            assert not formats_of_their_own(path.read_text("utf-8")), path


def test_no_page_writes_per_cent_without_a_space() -> None:
    assert len(PAGES) > 10
    for path in PAGES:
        assert not re.search(r"\d%", path.read_text("utf-8")), path
