"""Fields of rows that `dataset.ignore` leaves out."""

from collections.abc import Collection
from typing import Any

from finetune.data.messages import REASONING_KEYS, is_instruction
from finetune.data.types import Message, Messages

FIELDS = (
    "content",
    "reasoning",
    "tool_calls",
    "tools",
    "system",
    "history",
    "name",
    "tool_call_id",
    "train",
    "weight",
)
"""Fields that the common form defines. Other names must be those of columns or message keys."""


def expand_names(ignore: Collection[str]) -> frozenset[str]:
    """Return the keys of messages and the columns that names of `dataset.ignore` stand for."""
    names = set(ignore)
    if "reasoning" in names:
        names |= {*REASONING_KEYS}
    if "tool_calls" in names:
        names.add("function_call")
    return frozenset(names)


def drop_ignored(content: dict[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Return a row in the common form without the ignored fields.

    - `content` is the text beside tool calls; other messages keep theirs.
    - `reasoning` is `reasoning_content` and `thinking`.
    - `tool_calls` are the calls, messages that hold nothing else, and the tools' answers.
    - `system` are the system messages, `tools` the tool schemas.
    - Any other name is a key of messages.

    Args:
        content: The row.
        ignore: The names of `dataset.ignore`.
    """
    if not ignore or "messages" not in content:
        return content
    names = expand_names(ignore)
    messages: Messages = [
        _drop_keys(message, names)
        for message in content["messages"]
        if not _is_dropped(message, names)
    ]
    dropped = {**content, "messages": messages}
    if "tools" in names:
        dropped.pop("tools", None)
    return dropped


def _is_dropped(message: Message, names: Collection[str]) -> bool:
    if is_instruction(message):
        return "system" in names
    if "tool_calls" not in names:
        return False
    is_call_alone = "tool_calls" in message and not message["content"].strip()
    return is_call_alone or message["role"] == "tool"


def _drop_keys(message: Message, names: Collection[str]) -> Message:
    keys = set(names) - {"role", "content"}
    if "content" in names and "tool_calls" in message:
        message = {**message, "content": ""}
    return {key: value for key, value in message.items() if key not in keys}
