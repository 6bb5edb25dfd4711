"""Find the answers of a chat in its rendered text.

An answer begins after the generation prompt and ends with the token that ends it. Most templates
render a message alike whatever follows it: then one text holds all answers of a chat. Others render
earlier answers otherwise (Qwen 3 drops their reasoning, gpt-oss ends them with another token): an
answer that does not stand whole in the text gets a text of its own, which ends with it, as the
model will be asked for it.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.chat_template import ChatTemplate
from finetune.data.frames import Frames, Places, content_places
from finetune.data.messages import is_answer
from finetune.data.types import Message, Messages
from finetune.errors import ConfigError

NOT_WHOLE = "answers that the chat template does not render whole"
NO_QUESTION = "answers that begin a chat, before any question"
EMPTY = "answers that hold neither text nor a tool call"

_IGNORED_AS = {"system": "system", "developer": "system", "tool": "tool_calls"}
"""The names that `dataset.ignore` has for messages, by their roles."""


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a text, in characters."""

    turn: int
    """The number of its message, from 0."""
    start: int
    end: int
    """After the token that ends the answer, and white space that always follows it."""


@dataclass(frozen=True)
class Example:
    """A rendered chat, or its beginning, with answers to learn."""

    text: str
    answers: tuple[Answer, ...]
    """What is learnt, in order."""
    turns: int
    """Number of the chat's messages that stand in the text."""


@dataclass(frozen=True)
class Chat:
    """A chat to be rendered."""

    template: ChatTemplate
    messages: Messages
    """The messages in the common form."""
    tools: Sequence[Any] | None
    """Schemas of the tools that the model may call."""
    fallback_end: str | None
    """What ends an answer where the template writes nothing: the tokenizer's end token."""
    frames: Frames
    """What is remembered of the template from other chats."""

    def examples(self, last_only: bool = False) -> tuple[list[Example], Counter[str]]:
        """Render the chat in as few texts as hold every answer whole.

        Args:
            last_only: Learn the last answer alone.

        Returns:
            The examples, the shortest first, and how many answers are not learnt, by reason.

        Raises:
            ConfigError: The template refuses the chat.
        """
        unlearnt: Counter[str] = Counter()
        marked = [message for message in self.messages if is_learnt(message)]
        pending = [
            turn for turn, message in enumerate(self.messages) if is_answer(message)
        ]
        if len(marked) > len(pending):
            unlearnt[EMPTY] = len(marked) - len(pending)
        if last_only:
            pending = pending[-1:]
        if pending and pending[0] == 0:
            # Nothing asks for it, so no generation prompt says where it begins.
            pending = pending[1:]
            unlearnt[NO_QUESTION] += 1
        examples: list[Example] = []
        while pending:
            last = pending.pop()
            text = self._render_to(last)
            places = (
                None if self.tools else content_places(self.messages[: last + 1], text)
            )
            answer = self._find(text, last, places, self._last_answer)
            if answer is None:
                self._require_rendered(text, last)
                unlearnt[NOT_WHOLE] += 1
                continue
            if not examples and places is None:
                self._require_rendered(text, last)
            answers = [answer]
            for turn in pending:
                earlier = self._find(text, turn, places, self._earlier_answer)
                if earlier is not None:
                    answers.append(earlier)
            answers.sort(key=lambda answer: answer.turn)
            examples.append(Example(text, tuple(answers), last + 1))
            learnt = {answer.turn for answer in answers}
            pending = [turn for turn in pending if turn not in learnt]
        return examples[::-1], unlearnt

    def changed_answers(self, example: Example) -> int:
        """Return how many of an example's answers do not stand whole in its text."""
        answers = filter(is_answer, self.messages[: example.turns])
        return sum(not is_whole(answer, example.text) for answer in answers)

    def _find(
        self,
        text: str,
        turn: int,
        places: Places | None,
        search: Callable[[str, int], Answer | None],
    ) -> Answer | None:
        """Find an answer by what is remembered of the template, or exactly."""
        if places is None:
            return search(text, turn)

        def exact() -> tuple[int, int] | None:
            answer = search(text, turn)
            return None if answer is None else (answer.start, answer.end)

        span = self.frames.locate(self.messages, places, text, turn, exact)
        return None if span is None else Answer(turn, *span)

    def _require_rendered(self, text: str, last: int) -> None:
        """Refuse a chat of which the template leaves something out.

        Args:
            text: The chat up to the last answer.
            last: The number of that answer's message.

        Raises:
            ConfigError: It names each field that `dataset.ignore` would leave out.
        """
        missing = self._missing_context(text, last) | self._missing_fields(text, last)
        if not missing:
            return
        # One refusal names all, so that one change of the config is enough.
        for turn in range(last):
            if is_answer(self.messages[turn]):
                missing |= self._missing_fields(self._render_to(turn), turn)
        places = ", ".join(missing)
        fields = dict.fromkeys(missing.values())
        advice = (
            f"dataset.ignore=[{','.join(filter(None, fields))}] trains without that"
        )
        if None in fields:
            advice = "model.chat_template takes another template"
        raise ConfigError(f"not rendered by the chat template: {places}; {advice}")

    def _missing_fields(self, text: str, turn: int) -> dict[str, str | None]:
        """The reasoning and the calls of an answer that its text lacks.

        Returns:
            For each of them the name that `dataset.ignore` has for it.
        """
        message = self.messages[turn]
        missing: dict[str, str | None] = {}
        for name in ("reasoning_content", "thinking"):
            if message.get(name) and not stands_in(message[name], text):
                missing[f"{name} of message {turn + 1}"] = "reasoning"
        if not all(stands_in(value, text) for value in call_texts(message)):
            missing[f"tool_calls of message {turn + 1}"] = "tool_calls"
        return missing

    def _missing_context(self, text: str, last: int) -> dict[str, str | None]:
        """The tools, system turn, questions and tool results that a text lacks.

        Returns:
            For each of them the name that `dataset.ignore` has for it; None for questions, which
            can't be left out.
        """
        messages = self.messages[: last + 1]
        missing: dict[str, str | None] = {}
        # The names of tools stand in calls as well: only what has no effect is missing.
        if self.tools and text.startswith(self.template.render(messages)):
            missing["tools"] = "tools"
        if _stand_in_order(messages, text):
            return missing
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" or not message["content"].strip():
                continue
            # The template may have changed the content's form, or another message holds it too.
            changed = [
                *messages[:turn],
                {**message, "content": ""},
                *messages[turn + 1 :],
            ]
            if text.startswith(self.template.render(changed, self.tools)):
                field = _IGNORED_AS.get(message["role"])
                missing[f"content of message {turn + 1} ({message['role']})"] = field
        return missing

    def _render_to(self, turn: int) -> str:
        """The text of the chat up to a turn, with the end of its answer."""
        text = self._render(turn + 1)
        if self.template.ends_with_next_turn:
            end = self.template.next_turn_token(self.messages[: turn + 1], self.tools)
            return text + (end or self.template.end or "")
        if self._ends_with_special_token(text):
            return text
        return text + (self.template.end or self.fallback_end or "")

    def _last_answer(self, text: str, turn: int) -> Answer | None:
        """The last answer of a text; None if the template does not render it whole."""
        start = self._start(turn, text)
        before = self._generation_prompt(turn, text, start)
        whole = is_whole(self.messages[turn], text[start:], before)
        return Answer(turn, start, len(text)) if whole else None

    def _earlier_answer(self, text: str, turn: int) -> Answer | None:
        """An answer in a text that goes on after it; None if it is not whole there."""
        alone = self._render(turn + 1)
        common = common_length(alone, text)
        start = self._start(turn, alone)
        if start > common:
            return None
        end = self._end(
            text,
            start,
            common,
            is_all=common == len(alone),
        )
        if end is None:
            return None
        before = self._generation_prompt(turn, text, start)
        whole = is_whole(self.messages[turn], text[start:end], before)
        return Answer(turn, start, end) if whole else None

    def _end(
        self,
        text: str,
        start: int,
        common: int,
        is_all: bool,
    ) -> int | None:
        """Where an earlier answer's end token and the white space after it end.

        Args:
            text: The chat, which goes on after the answer.
            start: Where the answer begins.
            common: How far the text is that of the chat up to the answer.
            is_all: The text has all of the chat up to the answer.
        """
        if self.template.end is None:
            return common if is_all else None
        if self.template.ends_with_next_turn:
            match = self.template.special_tokens.match(text, common)
            return match.end() if is_all and match else None
        end = None
        for match in self.template.special_tokens.finditer(text, start):
            if match.end() > common:
                break
            end = match.end()
        if end is None:
            return None
        while end < common and text[end].isspace():
            end += 1
        return end

    def _start(self, turn: int, text: str) -> int:
        """Where the answer of a turn begins in a text that holds it."""
        prompt = self._render(turn, ask=True)
        if text.startswith(prompt):
            return len(prompt)
        # The generation prompt begins what the model thinks, or the template moved something.
        return max(common_length(prompt, text), self.content_start(turn, text))

    def _generation_prompt(self, turn: int, text: str, start: int) -> str:
        """The generation prompt before an answer; empty if the answer begins elsewhere."""
        prompt = self._render(turn, ask=True)
        if text[:start] != prompt:
            return ""
        return prompt[common_length(self._render(turn), prompt) :]

    def content_start(self, turn: int, text: str) -> int:
        """Where a different answer of a turn would diverge from a text that holds the answer."""
        different = {
            "role": "assistant",
            "content": "\0" + self.messages[turn]["content"],
        }
        changed = self.template.render([*self.messages[:turn], different], self.tools)
        start = common_length(changed, text)
        for match in self.template.special_tokens.finditer(text):
            if match.start() < start < match.end():
                return match.start()
        return start

    def _render(self, count: int, ask: bool = False) -> str:
        return self.template.render(self.messages[:count], self.tools, ask)

    def _ends_with_special_token(self, text: str) -> bool:
        matches = list(
            self.template.special_tokens.finditer(text, max(0, len(text) - 64))
        )
        return bool(matches) and not text[matches[-1].end() :].strip()


def is_learnt(message: Message) -> bool:
    """Whether a message is an answer that no mark excludes."""
    return message["role"] == "assistant" and bool(message.get("train", True))


def is_whole(message: Message, text: str, before: str = "") -> bool:
    """Whether everything that an answer holds stands in a text, but for white space.

    Args:
        message: The answer.
        text: What is learnt of it.
        before: The generation prompt, which may hold the beginning of the content (`<think>`).
    """
    if not _stands_from(message["content"], text, before):
        return False
    return all(stands_in(value, text) for value in further_texts(message))


def _stands_from(content: str, text: str, before: str) -> bool:
    """Whether a content stands in a text, or begins before the text and ends in it."""
    if content.strip() in text:
        return True
    squeezed, prompt = _squeeze(content), _squeeze(before)
    earliest = max(0, len(prompt) - len(squeezed) + 1)
    return squeezed in (prompt + _squeeze(text))[earliest:]


def further_texts(message: Message) -> list[str]:
    """The texts of a message beside its content: reasoning, names and arguments of tool calls."""
    reasoning = [
        message[name] for name in ("reasoning_content", "thinking") if message.get(name)
    ]
    return reasoning + call_texts(message)


def call_texts(message: Message) -> list[str]:
    """The names of a message's tool calls, and the texts and numbers in their arguments."""
    texts = []
    for call in message.get("tool_calls", ()):
        texts.append(call["function"]["name"])
        texts += _leaves(call["function"]["arguments"])
    return texts


def stands_in(value: str, text: str) -> bool:
    """Whether a value stands in a text, as it is or as JSON writes it, but for white space."""
    if value in text or _squeeze(value) in _squeeze(text):
        return True
    escaped = value.encode("unicode_escape").decode()
    return _squeeze(escaped) in _squeeze(text.replace('\\"', '"'))


def _stand_in_order(messages: Messages, text: str) -> bool:
    """Whether the contents of all messages stand in a text, one after the other."""
    position = 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, position)
        if start < 0:
            return False
        position = start + len(content)
    return True


def _leaves(value: Any) -> list[str]:
    """The texts and numbers inside the arguments of a call."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, bool) or value is None:
        return []  # true and True, null and None: each template has its own
    return [value if isinstance(value, str) else str(value)]


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return the number of characters or tokens with which both texts or lists begin."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
