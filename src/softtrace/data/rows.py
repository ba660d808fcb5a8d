"""What a row of data holds: a text, a conversation, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softtrace.errors import DataError

#: what is read of a row; the first of its texts, conversations and completions that is there counts
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "text",
    "tools", "system", "chat_template_kwargs",
)  # fmt: skip
#: of other layouts, which are refused by name
OTHER_COLUMNS = ("instruction", "output", "chosen", "rejected", "label")

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip


class Row(NamedTuple):
    """What one row holds.

    Attributes:
        text: the row's ``text``; or, where it is to be rendered, JSON of what is rendered.
        rendered: whether it is: a chat template writes the text of messages, and of a prompt and
            its completion not all counts in the loss.
    """

    text: str
    rendered: bool = False


def read_row(value: object, where: str, fix: str) -> Row:
    """What one row holds: ``messages`` (or ``conversations``), ``prompt`` and ``completion``, or
    ``text``, in this order where there are several.

    Args:
        value: a parsed row.
        where: it was found, for errors.
        fix: what to write instead, for errors.

    Raises:
        DataError: none of these, or one that is not what it should be; layouts of other names.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__}. {fix}")
    row = {key: each for key, each in value.items() if each is not None}
    conversation = next((key for key in ("messages", "conversations") if key in row), None)
    if conversation:
        messages = _messages(row[conversation], f"{where}: '{conversation}'")
        if not messages:
            return Row("")
        return _to_render({"messages": _with_system(row, messages, where)}, row, where)
    if "prompt" in row and "completion" in row and not isinstance(row.get("label"), bool):
        return _to_render(_prompt_and_completion(row, where), row, where)
    if "text" not in row:
        _refuse_other_layouts(row, where)
    return Row(_text(value, where, fix))


def _text(value: Mapping[str, object], where: str, fix: str) -> str:
    text = value.get("text")
    if not isinstance(text, str):
        found = f"of type {type(text).__name__}" if "text" in value else "missing"
        raise DataError(f"{where}: 'text' is {found}; the keys are {list(value)[:8]}. {fix}")
    return _checked(text, f"{where}: 'text'")


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair ({error}). Write the character whole."
        ) from error
    return text


def _to_render(content: dict[str, Any], row: Mapping[str, Any], where: str) -> Row:
    """JSON of what is rendered; the order of keys inside stays, since templates write it out."""
    tools = row.get("tools")
    if isinstance(tools, str):  # as trl wants them, where a column has one type
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: 'tools' is a string, but not JSON ({error})") from error
    if tools:
        content["tools"] = tools
    if row.get("chat_template_kwargs"):
        content["chat_template_kwargs"] = row["chat_template_kwargs"]
    try:
        text = json.dumps(content, ensure_ascii=False)
    except TypeError as error:
        raise DataError(f"{where} holds what JSON has no word for: {error}") from error
    return Row(_checked(text, where), rendered=True)


def _prompt_and_completion(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    parts = {key: row[key] for key in ("prompt", "completion")}
    if all(isinstance(part, str) for part in parts.values()):
        return parts
    if any(isinstance(part, str) for part in parts.values()):
        found = {key: type(part).__name__ for key, part in parts.items()}
        raise DataError(
            f"{where}: found {found}; 'prompt' and 'completion' must both be strings, or both "
            "lists of messages."
        )
    messages = {key: _messages(part, f"{where}: '{key}'") for key, part in parts.items()}
    empty = [key for key, each in messages.items() if not each]
    if empty:
        raise DataError(f"{where}: '{empty[0]}' holds no message. Give at least one, or drop it.")
    return {**messages, "prompt": _with_system(row, messages["prompt"], where)}


def _messages(value: object, where: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, without the keys that are null."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise DataError(
            f"{where} must be a list of messages, such as "
            """[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]."""
        )
    places = [f"{where}, message {number}" for number in range(1, len(value) + 1)]
    return [_message(each, place) for each, place in zip(value, places, strict=True)]


def _message(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    message = {key: each for key, each in value.items() if each is not None}
    if "from" in message and "role" not in message:  # ShareGPT's names
        speaker = str(message.pop("from"))
        if speaker not in _ROLES or "value" not in message:
            raise DataError(
                f"{where}: found 'from': {speaker!r} and the keys {list(value)}; allowed are "
                f"{', '.join(_ROLES)}, with a 'value'. Write other speakers as 'role' and "
                "'content', with the roles that the model's chat template knows."
            )
        message = {"role": _ROLES[speaker], "content": message.pop("value"), **message}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where}: found no 'role'; the keys are {list(value)}. Give it one.")
    content = message.get("content", "")
    parts = content if isinstance(content, list) else []
    others = sorted({str(_kind(part)) for part in parts if _kind(part) != "text"})
    if others or not isinstance(content, str | list):
        found = f"parts of type {', '.join(others)}" if others else type(content).__name__
        raise DataError(
            f"{where}: its 'content' is {found}; only text is read: a string, or a list of "
            """{"type": "text", "text": "..."}."""
        )
    return message


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else type(part).__name__


def _with_system(
    row: Mapping[str, Any], messages: Sequence[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """The messages, and in front of them what a column ``system`` says."""
    system = row.get("system")
    if not system:
        return list(messages)
    first = {"role": "system", "content": system}
    if not isinstance(system, str) or (messages[0]["role"] == "system" and messages[0] != first):
        raise DataError(
            f"{where}: 'system' must be a string, and the only one that the conversation begins "
            "with; found another one. Keep one of the two."
        )
    return list(messages) if messages[0] == first else [first, *messages]


def _refuse_other_layouts(row: Mapping[str, Any], where: str) -> None:
    if "instruction" in row and "output" in row:
        raise DataError(
            f"{where} has 'instruction' and 'output' (the layout of Alpaca), whose wording around "
            "them is not fixed. Write 'prompt' (instruction and input, worded as you will ask the "
            "model) and 'completion' (the output) instead, or 'messages'."
        )
    preferences = [key for key in ("chosen", "rejected", "label") if key in row]
    if (preferences and "completion" in row) or "chosen" in row:
        raise DataError(
            f"{where} has '{preferences[0]}' (preferences, as for DPO or KTO), and a model is "
            "fitted to all that it is given. Write what was preferred alone, as 'prompt' and "
            "'completion' or as 'messages'."
        )
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in row:
            raise DataError(
                f"{where} has a '{key}' without a '{other}'; the keys are {list(row)[:8]}. Give "
                "both, or one 'text'."
            )
