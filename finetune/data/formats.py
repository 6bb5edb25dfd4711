"""Formats of rows: each function converts one row to the common form."""

from collections.abc import Callable
from typing import Any

from finetune.data.types import Row
from finetune.errors import ConfigError, refusal


def detect_format(key: str, path: str, row: Row, text_field: str) -> str:
    columns = set(row)
    if text_field != "text" and text_field in columns:
        return "text"  # named on purpose
    if columns & {"messages", "conversations"}:
        return "chat"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if text_field in columns:
        return "text"
    raise refusal(
        "dataset.text_field",
        text_field,
        f"{key}={path} has no such field, and no chat either; its fields: {', '.join(map(str, row))}",
    )


def _field(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise ConfigError(f"{where} has no field '{name}'; its fields: {', '.join(map(str, row))}")
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: field '{name}' is no text but {type(value).__name__}")
    return value or ""


def _text(row: Row, where: str, text_field: str) -> Row | None:
    text = _field(row, text_field, where)
    return {"text": text} if text.strip() else None


def _chat(row: Row, where: str, _: str) -> Row | None:
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise ConfigError(f"{where} has no list 'messages' or 'conversations'; its fields: {', '.join(map(str, row))}")
    messages = [_message(turn, where) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    return {"messages": messages} if any(m["role"] == "assistant" and m["content"].strip() for m in messages) else None


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: a message must have 'role' and 'content', or 'from' and 'value'")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"{where}: a message must have 'role' and 'content', or 'from' and 'value', as text")
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _question_and_answer(question: str, answer: str) -> Row | None:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} if answer.strip() else None


def _prompt_completion(row: Row, where: str, text_field: str) -> Row | None:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _chat({"messages": row["prompt"] + row["completion"]}, where, text_field)
    return _question_and_answer(_field(row, "prompt", where), _field(row, "completion", where))


def _alpaca(row: Row, where: str, _: str) -> Row | None:
    question = _field(row, "instruction", where)
    context = _field(row, "input", where) if "input" in row else ""
    return _question_and_answer(
        f"{question}\n\n{context}" if context.strip() else question, _field(row, "output", where)
    )


FORMATS: dict[str, Callable[[Row, str, str], Row | None]] = {
    "text": _text, "chat": _chat, "prompt_completion": _prompt_completion, "alpaca": _alpaca,
}  # fmt: skip


def first_question(row: Row) -> str | None:
    """What a chat row asks first, None for plain text."""
    return next((turn["content"] for turn in row.get("messages", ()) if turn["role"] == "user"), None)
