"""Messages of chats in the common form, from the ways in which data sets write them."""

from collections.abc import Collection
from typing import Any

from finetune.data.tool_calls import normalize_tool_calls
from finetune.data.types import Message, Messages
from finetune.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles of the common form."""

CALL_ROLES = ("function_call", "tool_call")
"""Roles of a message whose text is a tool call of the assistant, or a list of them, as JSON."""

ROLE_SYNONYMS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "function_response": "tool",
}
"""Other words for roles, in any case."""

REASONING_KEYS = ("reasoning_content", "thinking")
"""The keys of an answer's reasoning. Templates read one or the other."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text."""

_IDENTIFIERS = {"id", "index", "type"}
"""Keys of a message that nothing is rendered of; they are left out."""

_REQUIRED = "a message must have 'role' and 'content', or 'from' and 'value'"


def normalize_messages(
    turns: Any, place: str, ignored: Collection[str] = ()
) -> Messages:
    """Return messages in the common form.

    `content` becomes text: parts of type text are joined without a separator, as templates that
    take parts render them, and null becomes the empty text. Tool calls become objects (see
    `normalize_tool_calls`). Keys that hold null or nothing are left out, and so are identifiers
    (`id`, `index`, `type`). Any other key stays under its name, so that the check of the rendered
    text finds those that the chat template does not render.

    Args:
        turns: A list of messages; or an object of lists, as columnar files hold lists of objects.
        place: What error messages call a message, without its number.
        ignored: Keys of messages that are left out.

    Raises:
        ConfigError: A message has no role, an unknown role, or content that is no text.
    """
    if isinstance(turns, dict):
        turns = _transpose(turns, place)
    return [
        _message(turn, f"{place} {number}", ignored)
        for number, turn in enumerate(turns, start=1)
    ]


def prepend_system(messages: Messages, text: str, where: str) -> Messages:
    """Return messages with a system message at the front.

    Args:
        messages: A chat, perhaps with a system message at the front.
        text: The system message's text. If it is empty, the messages stay as they are.
        where: The row and the column of the text, to begin error messages with.

    Raises:
        ConfigError: The chat begins with another system message.
    """
    if not text.strip():
        return messages
    if messages and is_instruction(messages[0]):
        if messages[0]["content"].strip() == text.strip():
            return messages
        raise ConfigError(
            f"{where} and the chat's first message are two different system turns"
        )
    return [{"role": "system", "content": text}, *messages]


def is_instruction(message: Message) -> bool:
    """Return whether a message is a system turn, or the developer's."""
    return message["role"] in ("system", "developer")


def is_answer(message: Message) -> bool:
    """Return whether a message is an answer to learn: the assistant's, with text or a call."""
    if message["role"] != "assistant" or message.get("train") is False:
        return False
    return bool(message["content"].strip()) or "tool_calls" in message


def _message(turn: Any, where: str, ignored: Collection[str]) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: {_REQUIRED}")
    if turn.keys() == {"role", "content"} and turn["role"] in ROLES:
        return {"role": turn["role"], "content": _text(turn["content"], where)}
    fields = {key: value for key, value in turn.items() if key not in ignored}
    has_content = not fields.keys().isdisjoint(
        {"content", "value", "tool_calls", "function_call"}
    )
    fields = {key: value for key, value in fields.items() if value is not None}
    role = _role(fields, where)
    if not has_content:
        raise ConfigError(f"{where}: {_REQUIRED}, as text")
    content = _either(fields, "content", "value", where)
    if role in CALL_ROLES:
        message: Message = {"role": "assistant", "content": ""}
        _add(message, "tool_calls", content, where)
    else:
        message = {"role": role, "content": _text(content, where)}
    for key, value in fields.items():
        if key not in {"role", "from", "content", "value"} | _IDENTIFIERS:
            _add(message, key, value, where)
    return message


def _role(fields: dict[str, Any], where: str) -> str:
    roles = [
        _normalize_role(fields[key], where) for key in ("role", "from") if key in fields
    ]
    if not roles:
        raise ConfigError(f"{where}: {_REQUIRED}")
    if roles[0] != roles[-1]:
        reason = f"role={fields['role']} and from={fields['from']}, which differ"
        raise ConfigError(f"{where} has {reason}")
    return roles[0]


def _normalize_role(role: Any, where: str) -> str:
    if not isinstance(role, str):
        raise ConfigError(f"{where}: {_REQUIRED}, as text")
    word = role.strip().lower().replace("-", "_").replace(" ", "_")
    word = ROLE_SYNONYMS.get(word, word)
    if word not in ROLES + CALL_ROLES:
        synonyms = ", ".join([*ROLE_SYNONYMS, *CALL_ROLES])
        allowed = f"{', '.join(ROLES)}, or another word for one ({synonyms})"
        raise ConfigError(f"{where}: role={role}: allowed: {allowed}")
    return word


def _either(
    fields: dict[str, Any],
    key: str,
    other_key: str,
    where: str,
) -> Any:
    """The value of one of two keys, of which a message has one."""
    if key in fields and other_key in fields and fields[key] != fields[other_key]:
        raise ConfigError(f"{where} has {key} and {other_key}, which differ")
    return fields.get(key, fields.get(other_key))


def _text(content: Any, where: str) -> str:
    """The text of a message's content: text, parts of type text, or null."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        reason = f"content must be text, null or a list of parts, but is {type(content).__name__}"
        raise ConfigError(f"{where}: {_REQUIRED}, as text; {reason}")
    parts = (
        _part_text(part, f"{where}, part {n}")
        for n, part in enumerate(content, start=1)
    )
    return "".join(parts)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        reason = f"must be an object with type and text, but is {type(part).__name__}"
        raise ConfigError(f"{where} {reason}")
    fields = {key: value for key, value in part.items() if value is not None}
    kind = fields.get("type", "text" if "text" in fields else None)
    if kind not in TEXT_PARTS:
        reason = f"is of type {kind}; allowed: text (images, audio and other types can't be learnt)"
        raise ConfigError(f"{where} {reason}")
    unknown = sorted(fields.keys() - {"text"} - _IDENTIFIERS)
    if unknown:
        raise ConfigError(f"{where} has {', '.join(unknown)}; allowed: type, text")
    text = fields.get("text", "")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: text is no text but {type(text).__name__}")
    return text


def _add(
    message: Message,
    key: str,
    value: Any,
    where: str,
) -> None:
    """Add a key to a message under its name in the common form, unless it holds nothing."""
    if key in ("train", "weight"):
        _mark(message, key, value, where)
    elif value in ("", [], {}):
        return
    elif key in ("tool_calls", "function_call"):
        calls = normalize_tool_calls(value, where)
        _require_assistant(message, key, where)
        _set(message, "tool_calls", calls, key, where)
    elif key == "reasoning" or key in REASONING_KEYS:
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {key} is no text but {type(value).__name__}")
        name = "reasoning_content" if key == "reasoning" else key
        _set(message, name, value, key, where)
    else:
        message[key] = value


def _mark(
    message: Message,
    key: str,
    value: Any,
    where: str,
) -> None:
    """Mark an answer that is context only. `true` and 1 say what holds without them."""
    allowed = {"train": "true or false", "weight": "0 or 1"}[key]
    is_flag = (
        isinstance(value, bool) if key == "train" else isinstance(value, int | float)
    )
    if not is_flag or value not in (0, 1):
        raise ConfigError(f"{where}: {key}={value}: must be {allowed}")
    if message["role"] == "assistant":
        if not value:
            message["train"] = False
    elif key == "train" and value:
        reason = "only the assistant's messages are learnt; dataset.ignore=[train] leaves it out"
        raise ConfigError(f"{where}: train=true with role={message['role']}: {reason}")


def _set(
    message: Message,
    name: str,
    value: Any,
    key: str,
    where: str,
) -> None:
    """Set a key that a message may have under two names."""
    if message.get(name, value) != value:
        raise ConfigError(f"{where} has {name} and {key}, which differ")
    message[name] = value


def _require_assistant(message: Message, key: str, where: str) -> None:
    if message["role"] != "assistant":
        reason = f"has {key}, which only an assistant's message may have"
        raise ConfigError(f"{where} of role {message['role']} {reason}")


def _transpose(turns: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """An object of lists as a list of objects."""
    columns = {key: value for key, value in turns.items() if isinstance(value, list)}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or len(columns) != len(turns):
        raise ConfigError(f"{place} 1: {_REQUIRED}; the messages must be a list")
    cells = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in cells]
