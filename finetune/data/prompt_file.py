"""Prompts of a file or of standard input: one a line, or JSON lines."""

import json
import sys
from pathlib import Path
from typing import Any

from finetune.config.data_folder import COMPRESSIONS, SUFFIXES
from finetune.data.messages import is_instruction, normalize_messages
from finetune.data.readers.json_text import JsonContentError, parse_json
from finetune.data.tool_calls import normalize_tools
from finetune.data.types import Messages, Prompt
from finetune.errors import ConfigError, refusal

STANDARD_INPUT = "-"
"""Names standard input in place of a file."""


JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines, in any case."""

OTHER_SUFFIXES = (*set(SUFFIXES) - {".txt", *JSON_LINES}, *COMPRESSIONS)
"""Suffixes of rows that are not read, rather than each of their lines taken for a prompt."""


def read_prompts(flag: str, name: str, system: str | None) -> list[Prompt]:
    """Read prompts, in their order. Empty lines are left out.

    Args:
        flag: The flag that names the file, for error messages.
        name: A file, or `-` for standard input. It is read as JSON lines where it ends with
            `.jsonl`, or, where the name has no suffix, where its first line begins with `{`.
        system: The system turn of prompts that have none; None: there is none.

    Raises:
        ConfigError: There is no such file, no prompt in it, or a line that holds none.
        OSError: The file can't be read.
    """
    suffix = Path(name).suffix.lower()
    if suffix in OTHER_SUFFIXES:
        allowed = "a prompt a line, or .jsonl with prompt or messages"
        raise refusal(flag, name, f"{suffix} is not read; must be text with {allowed}")
    text = _read(flag, name)
    numbered = enumerate(text.split("\n"), start=1)
    lines = [(number, line.strip()) for number, line in numbered if line.strip()]
    if not lines:
        raise refusal(flag, name, "has no prompt")
    is_json = suffix in JSON_LINES or (not suffix and lines[0][1].startswith("{"))
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
    path = Path(name).expanduser()
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise refusal(flag, name, "standard input is closed")
        content = sys.stdin.buffer.read()
    elif path.is_dir():
        raise refusal(flag, name, "is a folder")
    elif not path.exists():
        raise refusal(flag, name, "there is no such file")
    else:
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise refusal(flag, name, "must be UTF-8 text") from None


def _prompt(row: Any, system: str | None) -> Prompt:
    """Return the prompt of a row: `prompt`, a text or messages, or `messages`; perhaps `tools`.

    An assistant's message at the end, the answer of a training row, is left out.
    """
    keys = ("prompt", "messages")
    contents = (
        [row[key] for key in keys if row.get(key) is not None]
        if isinstance(row, dict)
        else []
    )
    if len(contents) != 1:
        raise ConfigError("must be an object with prompt or messages, one of them")
    (content,) = contents
    tools = row.get("tools")
    if tools is not None:
        tools = normalize_tools(tools, "tools")
    turn = row.get("system")
    if turn is not None and not isinstance(turn, str):
        raise ConfigError(f"system must be a text, but is {type(turn).__name__}")
    # An empty one is none, as in training rows; it takes the place of the command's too.
    system = system if turn is None else turn or None
    if isinstance(content, str) and content.strip():
        return Prompt(content, system, tools)
    messages = _messages(content)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or is_instruction(messages[-1]):
        raise ConfigError("has no message to answer")
    # A tool may return nothing.
    if messages[-1]["role"] != "tool" and not messages[-1]["content"].strip():
        reason = f"the last message, of role {messages[-1]['role']}, is empty"
        raise ConfigError(f"{reason}; its content must be a text that is not empty")
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
