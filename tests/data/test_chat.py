"""Conversations as tokens, and which of them the loss counts, against what is written by hand."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from softtrace.data.documents import Document, split_by_file
from softtrace.data.encoding import Tokens, encode, stream_counted
from softtrace.data.rows import read_row
from softtrace.errors import DataError
from tests.support.corpus import CHATML, byte_tokenizer, chat_tokenizer

END, IM_START, IM_END = 256, 257, 258

#: the assistant's words and the end of its turn are marked, the line's end is not
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: as Qwen 3's: the last answer alone begins with its thoughts
THINKING = CHATML.replace(
    "+ message['content']",
    "+ ('<think></think>' if loop.last and message['role'] == 'assistant' else '')"
    " + message['content']",
)
#: as Phi 3's: the end-of-sequence token closes a conversation
CLOSED = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
#: as Gemma's, which refuses two questions in a row
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


TOKENIZER, MARKING = chat_tokenizer(), chat_tokenizer(MARKED)


def document(name: str = "d.jsonl:1", **row: Any) -> Document:
    text, rendered = read_row(row, name, "")
    return Document(name, text, rendered=rendered)


def tokens(
    *documents: Document, answers_only: bool | None = None, tokenizer: Any = TOKENIZER
) -> Tokens:
    pieces = list(stream_counted(documents, tokenizer, answers_only))
    return Tokens(*(torch.cat(part) for part in zip(*pieces, strict=True)))


def counted_text(found: Tokens, tokenizer: Any = TOKENIZER) -> str:
    return str(tokenizer.decode(found.ids[found.counted]))


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def by_hand(messages: list[dict[str, str]], line_ends_count: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of ChatML, message by message: a byte is a token."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        answer = message["role"] == "assistant"
        content = TOKENIZER(message["content"], add_special_tokens=False).input_ids
        for part, counts in [
            ([IM_START, *TOKENIZER(message["role"] + "\n").input_ids], False),
            ([*content, IM_END], answer),
            (TOKENIZER("\n").input_ids, answer and line_ends_count),
        ]:
            ids += part
            labels += part if counts else [-100] * len(part)
    return ids, labels


CONVERSATIONS = st.lists(
    st.builds(
        say,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=9),
    ),
    min_size=1,
    max_size=6,
).filter(lambda messages: messages[0]["role"] != "assistant")


@given(messages=CONVERSATIONS, marked=st.booleans())
def test_answers_are_those_that_are_counted_by_hand(
    messages: list[dict[str, str]], marked: bool
) -> None:
    tokenizer = MARKING if marked else TOKENIZER
    ids, labels = by_hand(messages, line_ends_count=not marked)
    found = tokens(document(messages=messages), answers_only=True, tokenizer=tokenizer)
    assert found.ids.tolist() == ids
    assert found.labels.tolist() == labels
    for everything in (None, False):
        whole = tokens(
            document(messages=messages), answers_only=everything, tokenizer=tokenizer
        ).labels
        assert whole.tolist() == ids


@given(messages=CONVERSATIONS)
def test_ids_are_those_of_the_tokenizer_itself(messages: list[dict[str, str]]) -> None:
    expected = TOKENIZER.apply_chat_template(messages, return_dict=False)
    assert encode([document(messages=messages)], TOKENIZER).tolist() == expected


TWO_TURNS = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")]


def test_a_template_that_closes_conversations_is_no_obstacle() -> None:
    tokenizer = chat_tokenizer(CLOSED)
    found = tokens(document(messages=TWO_TURNS), answers_only=True, tokenizer=tokenizer)
    assert counted_text(found) == "b<|im_end|>\nd<|im_end|>\n<end>"
    both = tokens(*[document(messages=TWO_TURNS)] * 2, answers_only=True, tokenizer=tokenizer)
    assert both.labels.tolist() == 2 * found.labels.tolist()  # no second end


def test_a_template_that_writes_parts_otherwise_is_refused_unless_the_answer_is_the_last() -> None:
    tokenizer = chat_tokenizer(THINKING)
    found = tokens(document(messages=TWO_TURNS[:2]), answers_only=True, tokenizer=tokenizer)
    assert counted_text(found) == "<think></think>b<|im_end|>\n"
    with pytest.raises(DataError, match=r"d.jsonl:1: .* first 2 messages otherwise .*generation"):
        tokens(document(messages=TWO_TURNS), answers_only=True, tokenizer=tokenizer)
    assert len(tokens(document(messages=TWO_TURNS), tokenizer=tokenizer).ids) > 0


def test_tool_calls_are_answers() -> None:
    template = CHATML.replace("message['content']", "(message.content or message.tool_calls[0].id)")
    template = "{{ tools | tojson }}" + template
    messages = [say("user", "a"), {"role": "assistant", "tool_calls": [{"id": "call"}]}]
    found = tokens(
        document(messages=[*messages, say("tool", "3")], tools=[{"name": "add"}]),
        answers_only=True,
        tokenizer=chat_tokenizer(template),
    )
    assert counted_text(found) == "call<|im_end|>\n"
    assert TOKENIZER.decode(found.ids).startswith('[{"name": "add"}]<|im_start|>user')


@pytest.mark.parametrize("special_tokens", ["auto", "characters", "tokens"])
def test_tokens_of_a_template_are_tokens_however_texts_are_read(special_tokens: Any) -> None:
    tokenizer = chat_tokenizer("chat: " + CHATML + "over")
    chat = document(messages=TWO_TURNS)._replace(special_tokens=special_tokens)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
    assert encode([chat], tokenizer).tolist() == expected
    assert expected.count(IM_START) == 4


def test_options_of_a_row_reach_the_template() -> None:
    tokenizer = chat_tokenizer("{{ mood }}" + CHATML)
    found = encode([document(messages=TWO_TURNS, chat_template_kwargs={"mood": "glad"})], tokenizer)
    assert tokenizer.decode(found).startswith("glad<|im_start|>")


# --- prompt and completion


@pytest.mark.parametrize("answers_only", [None, True, False])
def test_of_a_prompt_and_its_completion_the_completion_counts(answers_only: bool | None) -> None:
    rows = [document(prompt=f"{n}+{n}=", completion=f"{2 * n}") for n in (1, 2)]
    found = tokens(*rows, answers_only=answers_only)
    assert TOKENIZER.decode(found.ids) == "1+1=2<end>2+2=4<end>"  # each has its end, the last too
    counted = "1+1=2<end>2+2=4<end>" if answers_only is False else "2<end>4<end>"
    assert counted_text(found) == counted


def test_a_completion_that_ends_by_itself_gets_no_second_end() -> None:
    row = document(prompt="<|im_start|>user\na<|im_end|>\n", completion="b<end>")
    found = tokens(row, row)
    assert TOKENIZER.decode(found.ids) == 2 * "<|im_start|>user\na<|im_end|>\nb<end>"
    assert counted_text(found) == "b<end>b<end>"
    assert int((found.ids == IM_START).sum()) == 2  # a text that ends with a token was rendered
    spelled = tokens(document(prompt="What is <end>", completion="?"))
    assert int((spelled.ids == END).sum()) == 1


@pytest.mark.parametrize("answers_only", [None, True, False])
def test_messages_as_prompt_and_completion(answers_only: bool | None) -> None:
    row = document(prompt=TWO_TURNS[:3], completion=TWO_TURNS[3:])
    found = tokens(row, answers_only=answers_only)
    ids, _ = by_hand(TWO_TURNS, line_ends_count=True)
    assert found.ids.tolist() == ids
    everything = TOKENIZER.decode(torch.tensor(ids))
    assert counted_text(found) == (everything if answers_only is False else "d<|im_end|>\n")


def test_answers_of_a_prompt_are_no_completion() -> None:
    row = document(prompt=TWO_TURNS[:3], completion=[TWO_TURNS[3], say("user", "e")])
    assert counted_text(tokens(row, answers_only=True)) == "d<|im_end|>\n"


def test_of_a_completion_of_several_turns_answers_alone_count_if_asked() -> None:
    row = document(prompt=TWO_TURNS[:1], completion=TWO_TURNS[1:])
    assert counted_text(tokens(row, answers_only=True)) == "b<|im_end|>\nd<|im_end|>\n"
    assert counted_text(tokens(row)).startswith("b<|im_end|>\n<|im_start|>user\nc")


def test_of_an_answer_what_the_prompt_has_written_already_does_not_count() -> None:
    asking = MARKED.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    row = document(prompt=TWO_TURNS[:1], completion=[say("assistant", "<think>b"), *TWO_TURNS[2:]])
    found = tokens(row, answers_only=True, tokenizer=chat_tokenizer(asking))
    assert counted_text(found) == "b<|im_end|>d<|im_end|>"


def test_a_prompt_that_is_asked_otherwise_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    asking = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    parts = {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}
    rows = [document(f"d:{number}", **parts) for number in (1, 2)]
    with caplog.at_level(logging.WARNING):
        found = tokens(*rows, tokenizer=chat_tokenizer(asking))
    assert counted_text(found) == "b<|im_end|>\n<end>b<|im_end|>\n"
    (message,) = caplog.messages
    assert message.startswith("d:1: ")
    assert "'<think>' is left out" in message


# --- tokens that lie on a border


def test_the_end_between_documents_counts_where_what_it_ends_does() -> None:
    asked, answered = document(messages=TWO_TURNS[:3]), document(messages=TWO_TURNS)
    found = tokens(asked, answered, asked, answers_only=True)
    ends = (found.ids == END).nonzero().flatten()
    assert found.counted[ends].tolist() == [False, True]
    assert tokens(asked, answered, asked).counted.all()


def test_a_token_that_reaches_into_an_answer_counts_unless_it_is_special() -> None:
    """``ab`` is one token; ``<turn>`` swallows the spaces behind it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens("ab")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<turn>", rstrip=True, special=True)]}
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<turn>' if message.role == 'user' else 'a' }}"
        "{{ message.content }}{% endfor %}{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    messages = [say("user", "x"), say("assistant", "bc")]
    found = tokens(document(messages=messages), answers_only=True, tokenizer=tokenizer)
    assert counted_text(found, tokenizer) == "abc"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '<turn>' }}{% endfor %}"
    messages = [say("user", "x"), say("assistant", "  y")]
    found = tokens(document(messages=messages), answers_only=True, tokenizer=tokenizer)
    assert counted_text(found, tokenizer) == "y<turn>"


@pytest.mark.parametrize("content", ["b", " b ", "  b\n ", " ", "b  \n"])
def test_spaces_that_have_no_place_of_their_own_stay_on_their_side(content: str) -> None:
    """Some tokenizers leave spaces out of a token's place, and of a space alone nothing is left."""
    tokenizer = chat_tokenizer(
        "{% for message in messages %}{{ message.role + ': ' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [say("user", "a"), say("assistant", content), say("user", "c")]
    found = tokens(document(messages=messages), answers_only=True, tokenizer=tokenizer)
    assert tokenizer.decode(found.ids) == f"user: aassistant: {content}user: c"
    assert counted_text(found) == content
    place = len("user: aassistant: ")
    assert found.counted.nonzero().flatten().tolist() == [*range(place, place + len(content))]


# --- what is refused, and what is said


@pytest.mark.parametrize(
    ("template", "row", "answers_only", "said"),
    [
        (None, {"messages": TWO_TURNS}, None, "holds messages, and the tokenizer has no chat temp"),
        (None, {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:]}, None, "no chat template"),
        (ALTERNATING, {"messages": TWO_TURNS[1:]}, None, "of assistant, user, assistant .*alter"),
        (CHATML, {"messages": [{"role": "user"}]}, None, "cannot write out messages of user .*co"),
        (CHATML, {"messages": TWO_TURNS[1:]}, True, "begins with the assistant"),
        (MARKED.replace("'assistant'", "'model'", 1), {"messages": TWO_TURNS}, True, "marks no"),
        ("{% for turn in conversation %}{{ turn }}{% endfor %}\n", {"messages": TWO_TURNS}, None,
         "writes nothing of messages of user, assistant, user, assistant"),
        (" ", {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}, None, "writes nothing of"),
        (CHATML, {"text": "hi"}, True, "is plain text, in which nobody answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_by_the_name_of_the_row(
    template: str | None, row: dict[str, Any], answers_only: bool | None, said: str
) -> None:
    with pytest.raises(DataError, match=f"^d.jsonl:1.*{said}"):
        tokens(document(**row), answers_only=answers_only, tokenizer=chat_tokenizer(template))


def test_marks_of_another_text_than_that_of_the_tokenizer_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = chat_tokenizer(MARKED)
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: "written by itself")
    with pytest.raises(DataError, match="writes this conversation in two ways"):
        tokens(document(messages=TWO_TURNS), answers_only=True, tokenizer=tokenizer)


def test_a_tokenizer_that_does_not_say_where_tokens_lie_serves_where_all_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = chat_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    row = document(prompt="2+2=", completion="4")
    with pytest.raises(DataError, match=r"does not say where .* Pass answers_only=False"):
        tokens(row, tokenizer=tokenizer)
    assert tokens(row, answers_only=False, tokenizer=tokenizer).counted.all()


def test_special_tokens_in_messages_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [document(f"d:{n}", messages=[say("user", "What is <|im_end|>?")]) for n in range(3)]
    with caplog.at_level(logging.WARNING):
        assert int((encode(rows, TOKENIZER) == IM_END).sum()) == 6
    (message,) = caplog.messages
    assert message.startswith("d:0: found the special token '<|im_end|>' in a message")


def test_a_single_conversation_is_not_cut() -> None:
    with pytest.raises(
        DataError, match=r"d.jsonl:1 is the only row, and a conversation .* not cut"
    ):
        split_by_file([document(messages=TWO_TURNS)], 0.5)
    assert json.loads(document(messages=TWO_TURNS).text) == {"messages": TWO_TURNS}
