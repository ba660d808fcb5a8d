"""Front matter: added to, never written anew."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from softtrace.errors import DataError
from softtrace.report.front_matter import with_metadata

METADATA = {"library_name": "transformers", "base_model": "owner/base"}
REST = "# Mine\n\n---\n\nA rule above.\n"


def added(page: str) -> tuple[str, Any]:
    """The front matter with what was added, and what it says; a second time adds nothing."""
    head, rest = with_metadata(page, METADATA, "softtrace")
    assert page.endswith(rest)
    assert with_metadata(head + rest, METADATA, "softtrace") == (head, rest)
    return head, yaml.safe_load(head.strip().strip("-."))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tags:\n- code\n", "tags:\n- code\n- softtrace\n"),
        ("tags:\n  - code # why\n# end\n", "tags:\n  - code # why\n  - softtrace\n# end\n"),
        ('tags:\n- "a b" # c\nx: 1\n', 'tags:\n- "a b" # c\n- softtrace\nx: 1\n'),
        ("tags:\n- code\n\n\nx: 1\n", "tags:\n- code\n- softtrace\n\n\nx: 1\n"),
        ("tags: &t\n- long\n  one\n", "tags: &t\n- long\n  one\n- softtrace\n"),
        ("tags: [a, 'b, c' ] # d\n", "tags: [a, 'b, c', softtrace ] # d\n"),
        ("tags: [a,\n  b, # ]\n]\n", "tags: [a,\n  b, softtrace, # ]\n]\n"),
        ("tags: []\n", "tags: [softtrace]\n"),
        ("tags: [ ] # none\n", "tags: [ softtrace] # none\n"),
        ('"tags": [\U0001f600]\n', '"tags": [\U0001f600, softtrace]\n'),
    ],
)
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_tag_joins_its_list(before: str, after: str, line: str) -> None:
    page = f"---\n{before}---\n{REST}".replace("\n", line)
    head, said = added(page)
    keys = "library_name: transformers\nbase_model: owner/base\n"
    assert head == f"---\n{after}{keys}---\n".replace("\n", line)
    assert said["tags"][-1] == "softtrace"
    assert ModelCard(head + REST).data.to_dict()["base_model"] == "owner/base"


@pytest.mark.parametrize(
    "before",
    [
        "tags: code\n",
        "tags:\n",
        "tags: [softtrace, b]\n",
        "tags: [&a x, *a]\n",
        "datasets: &d [a]\ntags: *d\n",
        "tags:\n-\n  code\n",
        "tags: [a]\ntags: [b]\n",
        "<<: {tags: [a]}\n",
    ],
)
def test_lists_that_cannot_be_added_to_stay(before: str) -> None:
    head, said = added(f"---\n{before}---\n{REST}")
    assert head.startswith(f"---\n{before}library_name: transformers\n")
    assert said["tags"] == yaml.safe_load(before)["tags"]


@pytest.mark.parametrize(
    ("before", "indent"),
    [
        ("version: 1.10\nlicense: 'mit' # c\n", ""),
        ("  license: mit\n", "  "),
        ("note: >-\n  folded\n  text\n\nkeep: |+\n  x\n\n", ""),
        ("# only a comment\n", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("end", ["---\n", "...\n", "--- \n"])
def test_missing_keys_come_last(before: str, indent: str, end: str) -> None:
    head, said = added(f"---\n{before}{end}{REST}")
    keys = ["library_name: transformers", "base_model: owner/base", "tags:", "- softtrace"]
    assert head == f"---\n{before}" + "".join(f"{indent}{key}\n" for key in keys) + end
    assert said == {**(yaml.safe_load(before) or {}), **METADATA, "tags": ["softtrace"]}


@pytest.mark.parametrize("value", ["peft", "", "null"])
def test_keys_that_are_there_stay_whatever_they_say(value: str) -> None:
    head, _ = added(f"---\nlibrary_name: {value}\nbase_model: {value}\ntags: [softtrace]\n---\n")
    assert head == (f"---\nlibrary_name: {value}\nbase_model: {value}\ntags: [softtrace]\n---\n")


def test_a_mapping_in_braces_stays() -> None:
    page = f"---\n{{license: mit}}\n---\n{REST}"
    assert with_metadata(page, METADATA, "softtrace") == ("---\n{license: mit}\n---\n", REST)


@pytest.mark.parametrize("page", [REST, "", "---\nnever: closed\n", "--- x\n---\n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_page_without_gets_one(page: str, line: str) -> None:
    page = page.replace("\n", line) if page else line
    head, rest = with_metadata(page, METADATA, "softtrace")
    assert rest == page
    assert head.count(line) == head.count("\n") == 6
    assert ModelCard(head + rest).data.to_dict() == {**METADATA, "tags": ["softtrace"]}


def test_a_page_that_ends_with_its_front_matter() -> None:
    head, rest = with_metadata("---\nlicense: mit\n---", METADATA, "softtrace")
    assert head.endswith("\n- softtrace\n---\n")
    assert rest == ""


@pytest.mark.parametrize("inside", ["- a list", "a: [", "words", "1: 2", "--- x\na: 1"])
@pytest.mark.parametrize("end", ["---", "..."])
def test_what_is_no_metadata_is_refused(inside: str, end: str) -> None:
    with pytest.raises(
        DataError, match=r"its front matter is no model card's[\s\S]*; repair it, or remove it"
    ):
        with_metadata(f"---\n{inside}\n{end}\n{REST}", METADATA, "softtrace")


def test_many_lines_that_nothing_closes_are_no_work() -> None:
    page = "---\r\n" + "word\r\n" * 20_000
    assert with_metadata(page, METADATA, "softtrace")[1] == page
