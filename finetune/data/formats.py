"""Formats of rows: one function for each, which converts a raw row to the common form.

To add a format: write its function, add it to `FORMATS` below, add its name to the type of
`DatasetSettings.format` in `finetune/config/sections/dataset.py`, and let `detect_format`
recognise its columns. `_alpaca` is an example.

The arguments and the result of such a function:

Args:
    row: A row as its file or the hub holds it.
    where: The key, the file and the number of the row, to begin error messages with.
    text_field: `dataset.text_field`; only plain text uses it.

Returns:
    The row as `{"text": …}`, or as `{"messages": [{"role": …, "content": …}, …]}` with an
    assistant's message last. None if the row has nothing to learn from (no text, no answer);
    such rows are counted and reported.

Raises:
    ConfigError: A field is missing or has the wrong type. The message names the field.
"""

from collections.abc import Callable
from typing import Any

from finetune.data.types import RawRow
from finetune.errors import ConfigError, refusal

Format = Callable[[RawRow, str, str], dict[str, Any] | None]


def _text(row: RawRow, where: str, text_field: str) -> dict[str, Any] | None:
    text = _field(row, text_field, where)
    return {"text": text} if text.strip() else None


def _chat(row: RawRow, where: str, _: str) -> dict[str, Any] | None:
    """`messages` as OpenAI and TRL write them, or ShareGPT's `conversations`."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        reason = f"has no list 'messages' or 'conversations'; its fields: {_field_names(row)}"
        raise ConfigError(f"{where} {reason}")
    messages = [_message(turn, where) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return {"messages": messages} if any(answer.strip() for answer in answers) else None


def _prompt_completion(row: RawRow, where: str, text_field: str) -> dict[str, Any] | None:
    """`prompt` and `completion`, as two texts or as two lists of messages."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat({"messages": prompt + completion}, where, text_field)
    return _question_and_answer(_field(row, "prompt", where), _field(row, "completion", where))


def _alpaca(row: RawRow, where: str, _: str) -> dict[str, Any] | None:
    """`instruction`, an optional `input` for it, and `output`."""
    question = _field(row, "instruction", where)
    context = _field(row, "input", where) if "input" in row else ""
    if context.strip():
        question = f"{question}\n\n{context}"
    return _question_and_answer(question, _field(row, "output", where))


FORMATS: dict[str, Format] = {
    "text": _text,
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
}
"""The formats by their names in `dataset.format`."""


def detect_format(key: str, path: str, row: RawRow, text_field: str) -> str:
    """Return the name of the format that a row has, by its columns.

    Args:
        key: The config key of the path, for error messages.
        path: The file or data set, for error messages.
        row: The first row.
        text_field: `dataset.text_field`. If it is not the default and the row has it, it decides.

    Raises:
        ConfigError: The columns are those of no format.
    """
    columns = set(row)
    if text_field != "text" and text_field in columns:
        return "text"
    if columns & {"messages", "conversations"}:
        return "chat"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if text_field in columns:
        return "text"
    reason = f"{key}={path} has no such field, and no chat either; its fields: {_field_names(row)}"
    raise refusal("dataset.text_field", text_field, reason)


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _message(turn: Any, where: str) -> dict[str, str]:
    required = "a message must have 'role' and 'content', or 'from' and 'value'"
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: {required}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"{where}: {required}, as text")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _question_and_answer(question: str, answer: str) -> dict[str, Any] | None:
    if not answer.strip():
        return None
    user = {"role": "user", "content": question}
    assistant = {"role": "assistant", "content": answer}
    return {"messages": [user, assistant]}


def _field(row: RawRow, name: str, where: str) -> str:
    """A field's text; null counts as empty."""
    if name not in row:
        raise ConfigError(f"{where} has no field '{name}'; its fields: {_field_names(row)}")
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: field '{name}' is no text but {type(value).__name__}")
    return value or ""


def _field_names(row: RawRow) -> str:
    return ", ".join(map(str, row))
