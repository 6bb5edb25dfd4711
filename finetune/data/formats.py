"""Formats of rows: one function for each, which converts a raw row to the common form.

To add a format: write its function, add it to `FORMATS` and its columns to `USUAL_COLUMNS` below,
and add its name to the type of `DatasetSettings.format` in `finetune/config/sections/dataset.py`.
`_alpaca` is an example.

The argument and the result of such a function:

Args:
    cells: The row's values by purpose: what the format calls them, not the names of the columns.

Returns:
    The row as `{"text": …}`, or as `{"messages": [{"role": …, "content": …}, …]}`, perhaps with
    `"tools": […]`. What follows the last answer is cut later. None if the row has nothing to learn
    from (no text, no answer); such rows are counted and reported.

Raises:
    ConfigError: A value has the wrong type. The message names the column.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.data.columns import Cells, column_names
from finetune.data.messages import normalize_messages, prepend_system
from finetune.data.types import Messages
from finetune.errors import ConfigError

Content = dict[str, Any]
"""A row in the common form, without its place."""


@dataclass(frozen=True)
class Format:
    """How rows of a format are converted, and which further columns they may have."""

    convert: Callable[[Cells], Content | None]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of optional columns, by purpose; the first that holds a value is used."""


def _text(cells: Cells) -> Content | None:
    text = cells.text("text")
    return {"text": text} if text.strip() else None


def _chat(cells: Cells) -> Content | None:
    """`messages` as OpenAI and TRL write them, or ShareGPT's `conversations`."""
    turns = cells.list_or_null("messages")
    if turns is None and isinstance(cells.value("messages"), list):
        return None
    if not isinstance(turns, list | dict):
        names = "' or '".join(USUAL_COLUMNS[0].columns["messages"])
        reason = f"has no list '{names}'; its fields: {column_names(cells.row)}"
        if "messages" in cells.columns:
            reason = f"has no list of messages in column '{cells.columns['messages']}'"
        raise ConfigError(f"{cells.where} {reason}")
    messages = normalize_messages(turns, f"{cells.where}, message", cells.ignored)
    return _with_system_and_tools(messages, cells)


def _prompt_completion(cells: Cells) -> Content | None:
    """A prompt and its completion: each a text, or a list of messages.

    Of the messages only those of the completion are learnt, as TRL does.
    """
    prompt = _prompt_messages(cells)
    completion = cells.value("completion")
    if _is_messages(completion):
        answer = normalize_messages(
            completion, f"{cells.where}, completion message", cells.ignored
        )
    else:
        answer = _answer(cells.answer())
    if not answer:
        return None
    return _with_system_and_tools([*_history(cells), *prompt, *answer], cells)


def _alpaca(cells: Cells) -> Content | None:
    """`instruction`, an optional `input` for it, and `output`."""
    question = cells.text("prompt")
    context = cells.text("input")
    if context.strip():
        question = f"{question}\n\n{context}"
    answer = _answer(cells.answer())
    if not answer:
        return None
    user = {"role": "user", "content": question}
    return _with_system_and_tools([*_history(cells), user, *answer], cells)


_SYSTEM_AND_TOOLS = {
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
}
_CHAT_CONTEXT = {**_SYSTEM_AND_TOOLS, "history": ("history",)}

FORMATS: dict[str, Format] = {
    "text": Format(_text),
    "chat": Format(_chat, _SYSTEM_AND_TOOLS),
    "prompt_completion": Format(_prompt_completion, _CHAT_CONTEXT),
    "alpaca": Format(_alpaca, {"input": ("input", "context"), **_CHAT_CONTEXT}),
}
"""The formats by their names in `dataset.format`."""


@dataclass(frozen=True)
class UsualColumns:
    """Columns by which a format is detected."""

    format: str
    columns: dict[str, tuple[str, ...]]
    """Names of the required columns, by purpose; a row has one of them."""
    needs_values: bool = False
    """Whether each of the columns must hold a value in the first row, or one of them."""

    def __str__(self) -> str:
        return " and ".join(" or ".join(names) for names in self.columns.values())


def _pair(prompt: str, completion: str) -> dict[str, tuple[str, ...]]:
    return {"prompt": (prompt,), "completion": (completion,)}


USUAL_COLUMNS: tuple[UsualColumns, ...] = (
    UsualColumns("chat", {"messages": ("messages", "conversations")}),
    UsualColumns("prompt_completion", _pair("prompt", "completion")),
    UsualColumns("prompt_completion", _pair("prompt", "response")),
    UsualColumns("prompt_completion", _pair("question", "answer")),
    UsualColumns("prompt_completion", _pair("question", "response")),
    UsualColumns("prompt_completion", _pair("query", "response")),
    UsualColumns("prompt_completion", _pair("query", "answer")),
    UsualColumns("prompt_completion", _pair("problem", "solution")),
    UsualColumns("alpaca", _pair("instruction", "output")),
    UsualColumns("alpaca", _pair("instruction", "response")),
    # After alpaca, whose rows may have such columns as well.
    UsualColumns("prompt_completion", _pair("input", "output")),
    # A text without a label is plain text.
    UsualColumns("prompt_completion", _pair("text", "label"), needs_values=True),
)
"""The columns of the formats, in the order in which they are looked for; plain text comes last."""


def describe_formats(text_field: str) -> str:
    """Return the columns of each format, for error messages."""
    columns: dict[str, list[str]] = {}
    for usual in USUAL_COLUMNS:
        columns.setdefault(usual.format, []).append(str(usual))
    columns["text"] = [text_field]
    return "; ".join(f"{name}: {', '.join(names)}" for name, names in columns.items())


def describe_format(name: str, text_field: str) -> str:
    """Return the columns of one format, for error messages."""
    names = [str(usual) for usual in USUAL_COLUMNS if usual.format == name]
    return f"{name} needs {', or '.join(names or [text_field])}"


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _prompt_messages(cells: Cells) -> Messages:
    prompt = cells.value("prompt")
    if not _is_messages(prompt):
        return [{"role": "user", "content": cells.text("prompt")}]
    return normalize_messages(prompt, f"{cells.where}, prompt message", cells.ignored)


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}] if text.strip() else []


def _history(cells: Cells) -> Messages:
    """Earlier turns: pairs of a question and its answer, or messages."""
    turns = cells.list_or_null("history")
    if turns is None:
        return []
    place = cells.place("history")
    if not isinstance(turns, list):
        reason = "must be a list of [question, answer], or of messages"
        raise ConfigError(f"{place} {reason}, but is {type(turns).__name__}")
    if isinstance(turns[0], dict):
        return normalize_messages(turns, f"{place}: message", cells.ignored)
    messages: Messages = []
    for number, pair in enumerate(turns, start=1):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or not all(
            isinstance(text, str) and text.strip() for text in pair
        ):
            raise ConfigError(
                f"{place}: item {number} must be two texts, [question, answer]"
            )
        messages += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


def _with_system_and_tools(messages: Messages, cells: Cells) -> Content:
    system = cells.text("system")
    if system:
        messages = prepend_system(messages, system, cells.place("system"))
    return {"messages": messages, **cells.tools()}
