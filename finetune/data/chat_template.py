"""Render chats by a tokenizer's chat template, the same on every day and for every use.

Training rows, evaluation, samples and `finetune.generate` all render here, so that a model is asked
exactly as it was trained.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.types import Message, Messages
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIXED_DATE = datetime.datetime(2024, 7, 26)
"""What templates that write today's date get: the date that Llama 3's own falls back to.

With the real date, the same rows would be other tokens on the next day.
"""

QUESTION, ANSWER, SYSTEM, NAME = "Qwhatq", "Aanswera", "Ssystems", "Nnamen"
"""Texts of the probes. A template writes them as they are, and no template holds them itself."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer with a chat template.
        variables: Further variables of the template (`model.template_kwargs`).
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})

    def render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        ask: bool = False,
    ) -> str:
        """Return the text of a chat.

        A system turn that the template can't render is put before the first question.

        Args:
            messages: The chat in the common form.
            tools: Schemas of the tools that the model may call.
            ask: Add a generation prompt, the beginning of an assistant's message.

        Raises:
            ConfigError: The template refuses the chat.
        """
        if self.folds_system:
            messages = fold_system(messages)
        return self._render(messages, tools, ask)

    @functools.cached_property
    def folds_system(self) -> bool:
        """Whether the template has no system turn, so that its text goes before the question.

        Some templates refuse one; some write it only into a question that stands last, and so drop
        it where an answer follows.
        """
        chat = [
            _message("system", SYSTEM),
            _message("user", QUESTION),
            _message("assistant", ANSWER),
        ]
        try:
            return SYSTEM not in self._render(chat)
        except ConfigError:
            return not self._refuses_every_chat

    @functools.cached_property
    def end(self) -> str | None:
        """The token that ends an answer, None if the template writes none.

        It is the first special token after an answer that ends the chat.
        """
        question, answer = _message("user", QUESTION), _message("assistant", ANSWER)
        try:
            text = self._render([question, answer])
        except ConfigError:
            return None
        match = self.special_tokens.search(text.rpartition(ANSWER)[2])
        return match[0] if match else self.next_turn_token([question, answer])

    def next_turn_token(
        self, messages: Messages, tools: Sequence[Any] | None = None
    ) -> str | None:
        """The special token with which a template begins the turn after a chat, if it does.

        Where a template writes no end (GLM 4.5), its models stop with this token.
        """
        calls_tool = "tool_calls" in messages[-1]
        following = _message("tool" if calls_tool else "user", QUESTION)
        try:
            text = self.render(messages, tools)
            longer = self.render([*messages, following], tools)
        except ConfigError:
            return None
        if not longer.startswith(text):
            return None
        match = self.special_tokens.match(longer, len(text))
        return match[0] if match else None

    @functools.cached_property
    def ends_with_next_turn(self) -> bool:
        """Whether an answer has no end but the token that begins the next turn."""
        chat = [_message("user", QUESTION), _message("assistant", ANSWER)]
        if self.end is None:
            return False
        return self.end not in self._render(chat).rpartition(ANSWER)[2]

    @functools.cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens of the tokenizer's vocabulary."""
        tokens = {
            *self._tokenizer.get_added_vocab(),
            *self._tokenizer.all_special_tokens,
        }
        # Of tokens that begin at the same place, the longest is the one that is meant.
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @functools.cached_property
    def turn_tokens(self) -> frozenset[str]:
        """The special tokens with which the template begins chats and turns."""
        try:
            chat = [_message("user", QUESTION), _message("assistant", ANSWER)]
            beginning = self._render(chat).partition(QUESTION)[0]
        except ConfigError:
            return frozenset()
        tokens = {match[0] for match in self.special_tokens.finditer(beginning)}
        return frozenset(tokens - {self.end})

    def without_end(self, message: Message) -> Message:
        """Return an answer without an end token at its end, as the template writes one."""
        if message["role"] != "assistant":
            return message
        content = message["content"].rstrip()
        for end in (self.end, self._tokenizer.eos_token):
            if end and content.endswith(end):
                return {**message, "content": content.removesuffix(end)}
        return message

    def writes_name(self, role: str) -> bool:
        """Whether the template writes the name of messages of a role."""
        chat = [_message("user", QUESTION), _message("assistant", ANSWER)]
        named = [
            {**message, "name": NAME} if message["role"] == role else message
            for message in chat
        ]
        try:
            return NAME in self._render(named)
        except ConfigError:
            return False

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template wants contents as lists of parts, as those of vision models do."""
        chat = [_message("user", QUESTION), _message("assistant", ANSWER)]
        try:
            return ANSWER not in self._apply(chat, None, False)
        except (
            Exception
        ):  # what a template raises on a text where it wants parts is its own
            try:
                return ANSWER in self._apply(_as_parts(chat), None, False)
            except Exception:
                return False

    def mentions(self, field: str) -> bool:
        """Whether the text of the template has the name of a field."""
        return field in self._text or field in self._tool_text

    @functools.cached_property
    def writes_date(self) -> bool:
        """Whether the template writes today's date, which is replaced by `FIXED_DATE`."""
        template: str = self._tokenizer.get_chat_template()
        return "strftime_now" in template

    @functools.cached_property
    def _refuses_every_chat(self) -> bool:
        try:
            self._render([_message("user", QUESTION), _message("assistant", ANSWER)])
        except ConfigError:
            return True
        return False

    @functools.cached_property
    def _text(self) -> str:
        return _with_fixed_date(self._tokenizer.get_chat_template())

    @functools.cached_property
    def _tool_text(self) -> str:
        """The template for chats with tools; some tokenizers have one of its own."""
        return _with_fixed_date(self._tokenizer.get_chat_template(tools=[{}]))

    @functools.cached_property
    def _all_variables(self) -> dict[str, Any]:
        return {**self._tokenizer.special_tokens_map, **self._variables}

    def _render(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        ask: bool = False,
    ) -> str:
        if self.takes_parts:
            messages = _as_parts(messages)
        try:
            return self._apply(messages, tools, ask)
        except Exception as error:  # a template is a program: it raises what it likes
            if not isinstance(error, TypeError):
                raise _refusal(messages, error) from error
        # Some templates concatenate a call's arguments with text (transformers#45419).
        with_texts = [_with_arguments_as_text(message) for message in messages]
        try:
            return self._apply(with_texts, tools, ask)
        except Exception as error:
            raise _refusal(messages, error) from error

    def _apply(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        ask: bool,
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        # `apply_chat_template` does the same, but collects the tokenizer's tokens for each chat.
        [text], _ = render_jinja_template(
            conversations=[[_without_marks(message) for message in messages]],
            tools=tools,
            chat_template=self._tool_text if tools else self._text,
            add_generation_prompt=ask,
            **self._all_variables,
        )
        return str(text)


def fold_system(messages: Messages) -> Messages:
    """Put the text of system turns before the next question; a chat without questions keeps it."""
    folded: Messages = []
    pending: list[str] = []
    for message in messages:
        if message["role"] == "system":
            pending.append(message["content"])
        elif message["role"] == "user" and pending:
            folded.append(
                {**message, "content": "\n\n".join([*pending, message["content"]])}
            )
            pending = []
        else:
            folded.append(message)
    if pending:
        folded.insert(0, _message("user", "\n\n".join(pending)))
    return folded


def _refusal(messages: Messages, error: Exception) -> ConfigError:
    """What a template raised, as one line."""
    roles = ", ".join(message["role"] for message in messages)
    reason = f"can't render a chat of {roles}: {' '.join(str(error).split())}"
    return ConfigError(f"model.chat_template: {reason}")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _as_parts(messages: Messages) -> Messages:
    """The messages with their contents as lists of one part of type text."""
    with_parts: Messages = []
    for message in messages:
        text_part = {"type": "text", "text": message["content"]}
        with_parts.append({**message, "content": [text_part]})
    return with_parts


def _without_marks(message: Message) -> Message:
    """The message without the project's own mark, which no template knows."""
    return {name: value for name, value in message.items() if name != "train"}


def _with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def _with_fixed_date(template: str) -> str:
    """The template with the fixed date in place of today's."""

    def date_text(match: re.Match[str]) -> str:
        return repr(FIXED_DATE.strftime(match[2]))

    return _DATE_CALL.sub(date_text, template)
