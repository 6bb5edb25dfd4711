"""Encode rows: token ids, and labels that say which tokens the loss counts."""

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.data.answers import NOT_WHOLE, Chat, Example, common_length
from finetune.data.chat_template import ChatTemplate
from finetune.data.frames import Frames
from finetune.data.messages import REASONING_KEYS, is_instruction
from finetune.data.types import Messages, Prompt
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Encoded:
    """An example as a model takes it. Both lists have its length in tokens."""

    ids: list[int]
    labels: list[int]
    """The ids where the loss counts, `IGNORED` elsewhere."""
    turns: int = 0
    """Number of the chat's messages that stand in the example; 0: the row is no chat."""
    turns_left_out: int = 0
    """Number of the chat's oldest messages that are left out, to leave room for an answer."""

    def has_label(self, length: int | None) -> bool:
        """Whether the loss counts any of the first tokens; no token predicts the first one."""
        return any(label != IGNORED for label in self.labels[1:length])


@dataclass(frozen=True)
class EncodedRow:
    """What a row becomes: one example, or several where the chat template needs them."""

    examples: list[Encoded]
    unlearnt: Counter[str] = field(default_factory=Counter)
    """How many of the row's answers are not learnt, by reason."""


class Encoder:
    """Encodes rows for one tokenizer.

    Args:
        tokenizer: The base's tokenizer.
        variables: Variables of the chat template (`model.template_kwargs`).
        loss_on: `dataset.loss_on`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        variables: Mapping[str, Any] | None = None,
        loss_on: str = "assistant",
    ) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._frames = Frames()
        self.template: ChatTemplate | None = None
        """The chat template; None if the tokenizer has none."""
        if tokenizer.chat_template is not None:
            self.template = ChatTemplate(tokenizer, variables)

    def encode(self, row: Mapping[str, Any]) -> EncodedRow:
        """Encode a row in the common form.

        Of chats the answers and their ends are learnt, of plain text all tokens.

        Raises:
            ConfigError: The tokenizer has no chat template for the chat, or the template refuses
                it, or leaves out one of its fields.
        """
        if "text" in row:
            ids = self._encode_text(row["text"])
            return EncodedRow([Encoded(ids, list(ids))])
        messages: Messages = row["messages"]
        if self._loss_on == "all":
            _refuse_marks(messages)
        if self.template is None:
            _refuse_without_template(messages, row.get("tools"))
            return EncodedRow([self._encode_pair(messages)])
        return self._encode_chat(
            messages, row.get("tools"), last_only=self._loss_on != "assistant"
        )

    def encode_without_oldest_turns(
        self,
        row: Mapping[str, Any],
        turns: int,
        length: int,
    ) -> Encoded | None:
        """Encode the end of a chat, with as many turns as leave room for its last answer.

        Args:
            row: A chat in the common form.
            turns: The number of its messages that are encoded; the last of them is the answer.
            length: The tokens within which a label must stand.

        Returns:
            The example; None if the last question alone is too long.
        """
        if self.template is None or not turns:
            return None
        messages: Messages = row["messages"]
        system = list(itertools.takewhile(is_instruction, messages))
        for start in range(len(system) + 1, turns):
            if messages[start]["role"] != "user":
                continue
            chat = [*system, *messages[start:turns]]
            encoded = self._encode_chat(chat, row.get("tools"), last_only=True)
            for example in encoded.examples:
                if example.has_label(length):
                    return example
        return None

    def _encode_chat(
        self,
        messages: Messages,
        tools: Sequence[Any] | None,
        last_only: bool,
    ) -> EncodedRow:
        assert self.template is not None
        messages = [self.template.without_end(message) for message in messages]
        chat = Chat(
            self.template, messages, tools, self._tokenizer.eos_token, self._frames
        )
        examples, unlearnt = chat.examples(last_only)
        if self._loss_on == "all" and examples:
            changed = chat.changed_answers(examples[-1])
            if changed:
                unlearnt[NOT_WHOLE] += changed
        return EncodedRow(
            [self._encode_example(chat, example) for example in examples], unlearnt
        )

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a question as rows have it, up to where the answer begins.

        Raises:
            ConfigError: The template refuses the chat; or there is none, and the chat is more than
                a question with a system turn.
        """
        if self.template is None:
            return self._beginning + self._plain_ids(_text_without_template(prompt))
        messages = prompt.messages
        if messages is None:
            messages = [{"role": "user", "content": prompt.text}]
            if prompt.system is not None:
                messages.insert(0, {"role": "system", "content": prompt.system})
        messages = [self.template.without_end(message) for message in messages]
        return self._plain_ids(self.template.render(messages, prompt.tools, ask=True))

    @property
    def ends(self) -> list[int]:
        """The ids of the tokens that end an answer: the template's and the tokenizer's."""
        tokens = [self._tokenizer.eos_token]
        if self.template is not None:
            tokens.append(self.template.end)
        ids = {
            self._tokenizer.convert_tokens_to_ids(token) for token in tokens if token
        }
        return sorted(ids)

    def _encode_example(self, chat: Chat, example: Example) -> Encoded:
        """Encode a rendered chat, with labels for its answers."""
        if self._loss_on == "all":
            ids = self._plain_ids(example.text)
            return Encoded(ids, list(ids), example.turns)
        if not self._tokenizer.is_fast:
            return self._encode_by_prefixes(example)
        encoding = self._tokenizer(
            example.text, add_special_tokens=False, return_offsets_mapping=True
        )
        ids = encoding["input_ids"]
        places = encoding["offset_mapping"]
        ends = [end for _, end in places]
        labels = [IGNORED] * len(ids)
        for answer in example.answers:
            first = bisect.bisect_right(ends, answer.start)
            if places[first][0] < answer.start:
                # A token holds the end of the prompt and what follows. If the template put
                # something between prompt and answer, the answer begins after that.
                content_start = chat.content_start(answer.turn, example.text)
                first = bisect.bisect_right(ends, max(answer.start, content_start))
            last = bisect.bisect_right(ends, answer.end)
            labels[first:last] = ids[first:last]
        return Encoded(ids, labels, example.turns)

    def _encode_by_prefixes(self, example: Example) -> Encoded:
        """Encode with a tokenizer that does not say where in the text its tokens stand."""
        ids = self._plain_ids(example.text)
        labels = [IGNORED] * len(ids)
        for answer in example.answers:
            start = common_length(self._plain_ids(example.text[: answer.start]), ids)
            end = common_length(self._plain_ids(example.text[: answer.end]), ids)
            labels[start:end] = ids[start:end]
        return Encoded(ids, labels, example.turns)

    def _encode_pair(self, messages: Messages) -> Encoded:
        """Encode a question and its answer one after the other, for a base without a template.

        If neither ends or begins with white space, the answer begins on a new line, which is learnt
        as part of it.
        """
        question, answer = (message["content"] for message in messages)
        needs_new_line = (
            question and not question[-1].isspace() and not answer[0].isspace()
        )
        ids = self._encode_text(question + ("\n" if needs_new_line else "") + answer)
        if self._loss_on == "all":
            return Encoded(ids, list(ids))
        # The tokens at the border can differ from those of the question alone.
        start = common_length(self._beginning + self._plain_ids(question), ids)
        return Encoded(ids, [IGNORED] * start + ids[start:])

    def _encode_text(self, text: str) -> list[int]:
        """Encode text with one beginning and one end, whichever of them it has already."""
        ids = self._plain_ids(text)
        if not self._has_end(ids) and self._tokenizer.eos_token is not None:
            ids = self._plain_ids(text + str(self._tokenizer.eos_token))
        beginning = self._beginning
        if ids[: len(beginning)] == beginning:
            return ids
        return beginning + ids

    def _has_end(self, ids: Sequence[int]) -> bool:
        """Whether tokens end with an end token, but for white space."""
        for token in reversed(ids):
            if token in self.ends:
                return True
            if self._tokenizer.decode([token]).strip():
                return False
        return False

    @functools.cached_property
    def _beginning(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, for example `<s>`."""
        plain = self._plain_ids("a")
        whole: list[int] = self._tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        return []

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _refuse_without_template(messages: Messages, tools: Sequence[Any] | None) -> None:
    """Refuse a chat that is more than a question and its answer, as text."""
    names = {"tools": bool(tools)}
    for message in messages:
        names["tool_calls"] = names.get("tool_calls", False) or "tool_calls" in message
        has_reasoning = any(key in message for key in REASONING_KEYS)
        names["reasoning"] = names.get("reasoning", False) or has_reasoning
    fields = [name for name, is_present in names.items() if is_present]
    if fields:
        reason = f"this tokenizer has none, which {', '.join(fields)} would need"
        advice = f"dataset.ignore=[{','.join(fields)}] trains without that"
        raise ConfigError(f"model.chat_template=null: {reason}; {advice}")
    if len(messages) > 2:
        reason = "this tokenizer has none, and the chats have more than two turns"
        raise ConfigError(f"model.chat_template=null: {reason}")
    if len(messages) < 2 or messages[0]["role"] == "assistant":
        reason = "this tokenizer has none, and the chats do not begin with a question"
        raise ConfigError(f"model.chat_template=null: {reason}")


def _text_without_template(prompt: Prompt) -> str:
    """Return a prompt as plain text, for a base without a template.

    Raises:
        ConfigError: It has tools, or is more than a question with a system turn.
    """
    if prompt.tools:
        reason = "this tokenizer has none, which tools would need"
        raise ConfigError(f"model.chat_template=null: {reason}")
    turns = [prompt.text] if prompt.system is None else [prompt.system, prompt.text]
    if prompt.messages is not None:
        *earlier, last = prompt.messages
        has_only_system = len(earlier) <= 1 and all(map(is_instruction, earlier))
        if not has_only_system or last["role"] == "assistant":
            roles = ", ".join(message["role"] for message in prompt.messages)
            allowed = "a prompt may be one user turn, with a system turn before it"
            reason = f"this tokenizer has none, and a prompt has the turns {roles}"
            raise ConfigError(f"model.chat_template=null: {reason}; {allowed}")
        turns = [message["content"] for message in prompt.messages]
    return "\n\n".join(turns)


def _refuse_marks(messages: Messages) -> None:
    """Refuse a chat with an answer that is marked as context, where every token is learnt."""
    for number, message in enumerate(messages, start=1):
        if message.get("train") is False:
            mark = "train: false or weight: 0"
            advice = "dataset.ignore=[train,weight] learns it too"
            reason = f"dataset.loss_on=all, but message {number} is context ({mark})"
            raise ConfigError(f"{reason}; {advice}")
