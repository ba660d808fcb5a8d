"""Conversations to text, as the model's chat template writes them, and which of it the loss counts.

Source of the conventions: trl's SFTTrainer (1.16). Of a prompt and its completion the completion
alone counts, and begins where the rendered prompt and the whole differ; a string completion ends
with the end-of-sequence token.
"""

from __future__ import annotations

import json
import logging
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from softtrace.data.documents import Document
from softtrace.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]
"""Places of characters: from the first up to, but without, the second."""


class Written(NamedTuple):
    """What is tokenized of a document.

    Attributes:
        text: all of it.
        by_template: whether a chat template wrote it, whose special tokens are tokens.
        counted: the characters that the loss counts; None for all.
        ends: whether the end-of-sequence token belongs to it.
    """

    text: str
    by_template: bool = False
    counted: Spans | None = None
    ends: bool = False


def spelled_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Special tokens that can be found in a text, as they are spelled."""
    return tuple(token for token in tokenizer.all_special_tokens if token.strip())


class Writer:
    """Writes documents out for one tokenizer.

    Args:
        tokenizer: with a chat template, where documents hold messages.
        answers_only: what the loss counts. True: of conversations what the assistant says, and
            completions. None: all of conversations, and completions. False: everything.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers_only: bool | None) -> None:
        self._tokenizer = tokenizer
        self._answers_only = answers_only
        self._spelled = spelled_tokens(tokenizer)
        self._said: set[str] = set()

    def write(self, document: Document) -> Written:
        """What is tokenized of a document.

        Raises:
            DataError: the tokenizer has no chat template, or one that cannot render this or writes
                nothing; answers alone shall count, and the document has none, or where they are
                cannot be told.
        """
        if not document.rendered:
            if self._answers_only:
                raise DataError(
                    f"{document.name} is plain text, in which nobody answers. Leave answers_only "
                    "out, or give rows with 'messages', or with 'prompt' and 'completion'."
                )
            return Written(document.text)
        row = json.loads(document.text)
        if isinstance(row.get("prompt"), str):
            prompt, text = row["prompt"], row["prompt"] + row["completion"]
            counted = None if self._answers_only is False else [(len(prompt), len(text))]
            return Written(text, counted=counted, ends=True)
        self._warn_of_special_tokens(document)
        chat = _Chat(document.name, self._tokenizer, row)
        if "messages" in row:
            text = chat.whole(row["messages"])
            counted = chat.answers(row["messages"], text) if self._answers_only else None
            return Written(text, by_template=True, counted=counted)
        return self._completion(chat, row["prompt"], row["completion"])

    def _completion(self, chat: _Chat, prompt: Messages, completion: Messages) -> Written:
        whole = [*prompt, *completion]
        text = chat.whole(whole)
        if self._answers_only is False:
            return Written(text, by_template=True)
        alone = chat.render(prompt, add_generation_prompt=True)
        pairs = zip(alone, text, strict=False)
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if start < len(alone):
            self._warn(
                "prompt",
                f"{chat.name}: the chat template writes the prompt alone otherwise than with its "
                f"completion, which is taken to begin where they differ; {alone[start:]!r} is left "
                "out, though the model will see it when it is asked",
            )
        counted = [(start, len(text))]
        if self._answers_only and any(each["role"] != "assistant" for each in completion):
            answers = chat.answers(whole, text)
            counted = [(max(first, start), last) for first, last in answers if last > start]
        return Written(text, by_template=True, counted=counted)

    def _warn_of_special_tokens(self, document: Document) -> None:
        spelled = next((token for token in self._spelled if token in document.text), None)
        if spelled is not None:
            self._warn(
                "spelled",
                f"{document.name}: found the special token {spelled!r} in a message. The model's "
                "chat template passes it on, so it is read as the token, as if the template had "
                "written it",
            )

    def _warn(self, what: str, message: str) -> None:
        """Once of each kind."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", message)


def asked(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages of a document, and how the template begins an answer to them."""
    row = json.loads(document.text)
    return _Chat(document.name, tokenizer, row).render(row["messages"], add_generation_prompt=True)


class _Chat:
    """One row's conversation, as the tokenizer's template writes it."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{name} holds messages, and the tokenizer has no chat template to write them out "
                "with. Use a model that was made for chat, give the tokenizer a template "
                "(tokenizer.chat_template = '...', then save it beside the model), or write every "
                "conversation out yourself as a 'text'."
            )
        self.name = name
        self._tokenizer = tokenizer
        self._tools = row.get("tools")
        self._options = row.get("chat_template_kwargs", {})

    def whole(self, messages: Messages) -> str:
        """The text of all messages, which is more than space."""
        text = self.render(messages)
        if not text.strip():
            raise DataError(
                f"{self.name}: the chat template writes nothing of messages of {_roles(messages)}. "
                "Give the tokenizer a template that writes out 'messages', or leave the row out."
            )
        return text

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of some messages."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=self._tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self._options,
                )
            )
        except Exception as error:  # a template is a program, and refuses by what it likes
            raise DataError(
                f"{self.name}: the chat template cannot write out messages of {_roles(messages)} "
                f"({type(error).__name__}: {error}). Change the messages to what the template "
                "takes, or the template."
            ) from error

    def answers(self, messages: Messages, text: str) -> Spans:
        """Where in the text the assistant speaks: as the template marks it, or by prefixes.

        Raises:
            DataError: it is not marked, and parts of the conversation are not rendered as they are
                in the whole.
        """
        places = [at for at, each in enumerate(messages) if each["role"] == "assistant"]
        template = self._tokenizer.get_chat_template(tools=self._tools)
        if "endgeneration" in template:
            marked = self._marked(messages, template, text)
            if places and not marked:
                raise DataError(
                    f"{self.name}: the chat template has {{% generation %}}, but marks nothing of "
                    "this conversation's answers with it. Mend the template, or leave answers_only "
                    "out."
                )
            return marked
        return [self._by_prefixes(messages, text, place) for place in places]

    def _marked(self, messages: Messages, template: str, text: str) -> Spans:
        """What stands between ``{% generation %}`` and ``{% endgeneration %}``.

        By characters: what the tokenizer makes of them itself (``return_assistant_tokens_mask``)
        takes all that follows where a mark's last character has no token of its own.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        found: Any = render_jinja_template(  # declared to return a string
            conversations=[messages],
            tools=self._tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **self._options},
        )
        (rendered,), (spans,) = found
        if rendered != text:
            raise DataError(
                f"{self.name}: the chat template writes this conversation in two ways, with and "
                "without marks of its answers. Leave answers_only out."
            )
        return [(first, last) for first, last in spans]

    def _by_prefixes(self, messages: Messages, text: str, place: int) -> tuple[int, int]:
        """The characters from where the model is asked for the message to where that ends."""
        if place == 0:
            raise DataError(
                f"{self.name}: the conversation begins with the assistant, so what asks for that "
                "answer cannot be told. Begin with a message of the user, or leave answers_only "
                "out."
            )
        before = self.render(messages[:place], add_generation_prompt=True)
        through = self.render(messages[: place + 1])
        if not text.startswith(through):  # some templates close every conversation with it (Phi 3)
            through = through.removesuffix(str(self._tokenizer.eos_token))
        both = text.startswith(before) and text.startswith(through)
        if not both or len(through) <= len(before):
            raise DataError(
                f"{self.name}: the chat template writes the first {place + 1} messages otherwise "
                "alone than in the whole conversation, so where that answer lies cannot be told. "
                "Give the tokenizer a template that puts {% generation %} and {% endgeneration %} "
                "around answers, or leave answers_only out."
            )
        return len(before), len(through)


def _roles(messages: Messages) -> str:
    return ", ".join(str(each["role"]) for each in messages)
