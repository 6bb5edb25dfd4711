"""Encode rows: token ids, and labels that say which tokens the loss counts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.data.types import Messages, Row
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that the loss leaves out."""

Encoded = tuple[list[int], list[int]]
"""Token ids and labels of a row, both of its length in tokens."""


def encode(row: Row, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Encode a row in the common form.

    Labels equal the ids where the loss counts and are -100 elsewhere. Of chats the assistant's
    tokens count, the end-of-turn token among them, as with TRL's prompt and completion columns; of
    plain text all tokens count.

    Raises:
        ConfigError: The tokenizer has no chat template, or its template refuses the chat.
    """
    if "text" in row:
        ids: list[int] = tokenizer(_with_end_token(row["text"], tokenizer))["input_ids"]
        return ids, list(ids)
    if tokenizer.chat_template is None:
        return _encode_without_template(row["messages"], tokenizer)
    return _encode_chat(row["messages"], tokenizer)


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, ask: bool = False
) -> list[int]:
    """Return a chat's token ids by the tokenizer's template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The chat.
        ask: Add a generation prompt, the beginning of an assistant's message.

    Raises:
        ConfigError: The template refuses the chat (some take no system message); the message holds
            the template's own words.
    """
    from jinja2 import TemplateError

    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=ask, return_dict=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = f"can't render a chat of {roles}: {error}"
        raise ConfigError(f"model.chat_template: {reason}") from error
    return ids


def _encode_without_template(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Encode a question and its answer one after the other, for a base without a chat template.

    If neither ends or begins with white space, the answer begins on a new line, which is learnt as
    part of it.
    """
    if len(messages) != 2:
        reason = "this tokenizer has none, and the chats have more than two turns"
        raise ConfigError(f"model.chat_template=null: {reason}")
    question, answer = (message["content"] for message in messages)
    needs_new_line = question and not question[-1].isspace() and not answer[0].isspace()
    text = question + ("\n" if needs_new_line else "") + answer
    question_ids = tokenizer(question)["input_ids"]
    ids = tokenizer(_with_end_token(text, tokenizer))["input_ids"]
    # The tokens at the border can differ from those of the question alone.
    start = _common_prefix(question_ids, ids)
    return ids, [IGNORED] * start + ids[start:]


def _encode_chat(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    """Encode a chat by the tokenizer's template, with labels for the assistant's messages.

    An answer begins where the whole chat and the chat so far with a generation prompt diverge, and
    ends where the next message begins. Some templates render an answer differently once other
    messages follow it (they drop its reasoning): no such span exists then, and only the last answer
    has labels.
    """
    ids = render_chat(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn == 0:
            continue
        start = _answer_start(tokenizer, messages, turn, ids)
        end = len(ids)
        if turn < len(messages) - 1:
            end = _common_prefix(render_chat(tokenizer, messages[: turn + 1]), ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def _answer_start(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, turn: int, ids: list[int]
) -> int:
    """The index in a chat's `ids` at which the answer of a turn begins."""
    prompt = render_chat(tokenizer, messages[:turn], ask=True)
    start = _common_prefix(prompt, ids)
    if start == len(prompt):
        return start
    # The template moved something: the answer begins where a different answer would diverge.
    different_answer = {**messages[turn], "content": "\0"}
    different_chat = [*messages[:turn], different_answer, *messages[turn + 1 :]]
    return max(start, _common_prefix(render_chat(tokenizer, different_chat), ids))


def _with_end_token(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text with the end token, so that generation learns to stop."""
    end = str(tokenizer.eos_token)
    return text if text.endswith(end) else text + end


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens with which both sequences begin."""
    for index, (left_id, right_id) in enumerate(zip(left, right, strict=False)):
        if left_id != right_id:
            return index
    return min(len(left), len(right))
