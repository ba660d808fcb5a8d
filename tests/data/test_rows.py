"""What a row of data holds, and which layouts are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from softtrace.data.rows import Row, read_row
from softtrace.errors import DataError

ASKED = {"role": "user", "content": "Two and two?"}
ANSWERED = {"role": "assistant", "content": "Four."}
MESSAGES = [ASKED, ANSWERED]


def read(**row: Any) -> Row:
    return read_row(row, "d.jsonl, line 3", "Write another.")


def rendered(**row: Any) -> Any:
    text, is_rendered = read(**row)
    assert is_rendered
    return json.loads(text)


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": MESSAGES}, {"messages": MESSAGES}),
        ({"messages": MESSAGES, "prompt": "Two", "text": "x"}, {"messages": MESSAGES}),
        ({"conversations": MESSAGES}, {"messages": MESSAGES}),
        ({"messages": None, "conversations": MESSAGES}, {"messages": MESSAGES}),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Two and two?"},
                    {"from": "gpt", "value": "Four.", "weight": None},
                ]
            },
            {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        ),
        (
            {"system": "Be brief.", "messages": MESSAGES},
            {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        ),
        ({"system": "", "messages": MESSAGES}, {"messages": MESSAGES}),
        ({"messages": [{**ASKED, "name": None}, ANSWERED]}, {"messages": MESSAGES}),
        ({"prompt": "2+2=", "completion": "4", "text": "x"}, {"prompt": "2+2=", "completion": "4"}),
        (
            {"prompt": [ASKED], "completion": [ANSWERED], "label": None},
            {"prompt": [ASKED], "completion": [ANSWERED]},
        ),
    ],
)
def test_a_row_that_is_rendered(row: dict[str, Any], content: dict[str, Any]) -> None:
    assert rendered(**row) == content


@pytest.mark.parametrize("name", ["text", "messages", "conversations"])
def test_empty_rows_are_empty_texts(name: str) -> None:
    assert read(**{name: "" if name == "text" else []}) == Row("")


def test_a_text_stays_a_text() -> None:
    assert read(text="[1]", instruction="x", output="y") == Row("[1]")


def test_tools_and_options_of_the_template_go_along_in_their_order() -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    found = rendered(
        messages=[ASKED, call], tools=json.dumps(tools), chat_template_kwargs={"thinking": False}
    )
    assert found == {
        "messages": [ASKED, call], "tools": tools, "chat_template_kwargs": {"thinking": False},
    }  # fmt: skip
    assert rendered(messages=MESSAGES, tools=tools)["tools"] == tools
    assert "tools" not in rendered(messages=MESSAGES, tools=[])
    # templates write these keys out as they come
    assert list(found["tools"][0]["function"]) == ["name", "description"]


def test_the_text_tells_rows_apart_and_does_not_depend_on_other_columns() -> None:
    one = read(messages=MESSAGES, id=1)
    assert one == read(id=2, messages=MESSAGES)
    assert one != read(messages=[ASKED, {**ANSWERED, "content": "Five."}])
    assert "\n" not in one.text


PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": "b"}, r"line 3 has 'instruction' .* Write 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has 'chosen' .preferences"),
        ({"prompt": "a", "completion": "b", "label": False}, "has 'label' .preferences"),
        ({"prompt": "a"}, "'prompt' without a 'completion'"),
        ({"completion": "a"}, "'completion' without a 'prompt'"),
        ({"prompt": "a", "completion": [ANSWERED]}, "must both be strings, or both lists"),
        ({"prompt": [], "completion": [ANSWERED]}, "'prompt' holds no message"),
        ({"prompt": {"role": "user"}, "completion": [ANSWERED]}, "'prompt' must be a list"),
        ({"messages": "hi"}, "'messages' must be a list of messages, such as"),
        ({"messages": ["hi"]}, "'messages' must be a list of messages, such as"),
        ({"messages": [ASKED, {"content": "x"}]}, "'messages', message 2: found no 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: its 'content' is int"),
        ({"messages": [{"role": "user", "content": [PART]}]}, "parts of type image_url; only text"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "found 'from': 'bing' .* human, "),
        ({"conversations": [{"from": "gpt", "text": "x"}]}, "with a 'value'"),
        ({"messages": MESSAGES, "tools": "[add"}, "'tools' is a string, but not JSON"),
        ({"messages": MESSAGES, "tools": [{1, 2}]}, "holds what JSON has no word for: .*set"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "found another one"),
        ({"question": "a", "answer": "b"}, r"'text' is missing; the keys are \['question', 'answ"),
    ],
)
def test_other_rows_are_refused_by_name(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(**row)
    assert str(caught.value).startswith("d.jsonl, line 3")
    assert "\n" not in str(caught.value)
