"""Prompts of their own lengths: what stands before an answer, begun as the tokenizer begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softtrace.data import read_documents
from softtrace.data.documents import Document
from softtrace.data.prompts import whole_prompts
from softtrace.errors import DataError, InvalidInputError
from tests.support.corpus import byte_tokenizer


def test_prompts_end_where_answers_begin(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "one two", "completion": " three"}, {"text": "all of it"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    found = whole_prompts(read_documents(file), tokenizer, 64, 8)
    assert [tokenizer.decode(each) for each in found] == ["one two", "all of it"]
    short = whole_prompts(read_documents(file), tokenizer, 3, 1)
    assert [tokenizer.decode(each) for each in short] == ["two"]  # the last tokens of the first


def test_a_conversation_is_asked_for_its_next_answer(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "rows.jsonl", byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    question, answer = ({"role": role, "content": role[-2:]} for role in ("user", "assistant"))
    rows = [{"messages": [question]}, {"messages": [question, answer, question, answer]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = whole_prompts(read_documents(file), tokenizer, 64, 8)
    assert [tokenizer.decode(each) for each in found] == ["u:er;a:", "u:er;a:"]


def test_no_prompt_is_named() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="found no prompt in 1 documents"):
        whole_prompts([Document("empty", "")], tokenizer, 8, 2)
    with pytest.raises(InvalidInputError, match="longest: found 0"):
        whole_prompts([Document("a", "b")], tokenizer, 0, 2)
