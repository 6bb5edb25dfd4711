"""Prompts of a file or of standard input: one a line, or JSON lines."""

import json
import sys
from pathlib import Path
from typing import Any

from finetune.data.messages import is_instruction, normalize_messages
from finetune.data.readers.json_text import JsonContentError, parse_json
from finetune.data.types import Messages, Prompt
from finetune.errors import ConfigError, refusal

STANDARD_INPUT = "-"
"""Names standard input in place of a file."""


def read_prompts(flag: str, name: str, system: str | None) -> list[Prompt]:
    """Read prompts, in their order. Empty lines are left out.

    Args:
        flag: The flag that names the file, for error messages.
        name: A file, or `-` for standard input. It is read as JSON lines where it ends with
            `.jsonl`, or, of standard input, where its first line begins with `{`.
        system: The system turn of prompts that have none; None: there is none.

    Raises:
        ConfigError: There is no such file, no prompt in it, or a line that holds none.
        OSError: The file can't be read.
    """
    text = _read(flag, name)
    numbered = enumerate(text.split("\n"), start=1)
    lines = [(number, line.strip()) for number, line in numbered if line.strip()]
    if not lines:
        raise refusal(flag, name, "has no prompt")
    is_json = name.endswith(".jsonl")
    if name == STANDARD_INPUT:
        is_json = lines[0][1].startswith("{")
    if not is_json:
        return [Prompt(line, system) for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            prompts.append(_prompt(parse_json(line), system))
        except (json.JSONDecodeError, JsonContentError, ConfigError) as error:
            raise refusal(flag, name, f"line {number}: {error}") from None
    return prompts


def _read(flag: str, name: str) -> str:
    if name == STANDARD_INPUT:
        return sys.stdin.read()
    path = Path(name).expanduser()
    if not path.is_file():
        raise refusal(flag, name, "there is no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise refusal(flag, name, "must be UTF-8 text") from None


def _prompt(row: Any, system: str | None) -> Prompt:
    """Return the prompt of a row: `prompt`, a text or messages, or `messages`; perhaps `tools`.

    An assistant's message at the end, the answer of a training row, is left out.
    """
    if not isinstance(row, dict) or not {"prompt", "messages"} & row.keys():
        raise ConfigError("must be an object with prompt or messages")
    content = row.get("messages", row.get("prompt"))
    tools = row.get("tools")
    if isinstance(content, str) and content:
        return Prompt(content, row.get("system", system), tools)
    messages = _messages(content)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or is_instruction(messages[-1]):
        raise ConfigError("has no message to answer")
    if system is not None and not is_instruction(messages[0]):
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(messages[-1]["content"], tools=tools, messages=messages)


def _messages(content: Any) -> Messages:
    """Return messages in the common form, as those of rows."""
    if not isinstance(content, list) or not content:
        raise ConfigError("prompt must be a text or a list of messages, not empty")
    for message in content:
        is_message = isinstance(message, dict) and {"role", "content"} <= message.keys()
        if not is_message:
            raise ConfigError("each message must be an object with role and content")
    return normalize_messages(content, "message")
