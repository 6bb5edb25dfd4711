"""The words of a row, for comparisons that ignore case, white space and punctuation.

Symbols (`+`, `=`, `$`) count, and `-`, `*`, `/` and `%` before a digit, so that `1 + 1` and `1 - 1`
are different questions.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

from finetune.data.types import Message, Row

ANSWER_WORDS = 8
"""Shorter answers repeat in every classification data set, and say nothing of a leak."""

_OPERATORS = "-*/%"

_IGNORED_SYMBOLS = "`~|"
"""Symbols that only format text."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts without spaces between words: each character counts as a word."""

_DIGIT = re.compile(r"\d")

_SPACE_OF_WORDS = re.compile(r"(?<!\d) | (?!\d)")


class Wording(NamedTuple):
    """The texts of a row that are compared with those of other rows."""

    question: str
    """All text before the last answer; empty where nobody asks anything."""
    last_answer: str
    """The last answer with its reasoning and tool calls; of plain text all of it."""
    answers: list[str]
    """All answers, without reasoning."""


def wording(row: Row) -> Wording:
    """Return the texts of a row in the common form."""
    if "messages" not in row:
        text = str(row.get("text", ""))
        return Wording("", text, [])
    messages: list[Message] = row["messages"]
    roles = [message.get("role") for message in messages]
    last = max(
        (index for index, role in enumerate(roles) if role == "assistant"), default=0
    )
    is_asked = any(role not in ("system", "developer") for role in roles[:last])
    question = "\n".join(map(_message_text, messages[:last])) if is_asked else ""
    answers = [
        _content(message) for message in messages if message.get("role") == "assistant"
    ]
    return Wording(question, "\n".join(map(_message_text, messages[last:])), answers)


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case; ideographs and operators are words."""
    is_ascii = text.isascii()
    folded = (text if is_ascii else unicodedata.normalize("NFKC", text)).casefold()
    found = _word_pattern(is_ascii).findall(folded)
    return found or folded.split()


def join_words(text_words: list[str]) -> str:
    """Return what two texts have in common if they differ in white space and punctuation only.

    Words are joined without space, but for a space between two digits.
    """
    text = " ".join(text_words)
    return (
        _SPACE_OF_WORDS.sub("", text) if _DIGIT.search(text) else text.replace(" ", "")
    )


def _message_text(message: Message) -> str:
    """All that a message says."""
    fields = ("reasoning_content", "thinking", "content", "tool_calls")
    return "\n".join(_plain(message[name]) for name in fields if message.get(name))


def _content(message: Message) -> str:
    return _plain(message.get("content") or "")


def _plain(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str)
    )


@functools.cache
def _word_pattern(is_ascii: bool) -> re.Pattern[str]:
    """Compiled at first use: the characters of Unicode's first plane are gone through.

    Args:
        is_ascii: Whether the pattern is for ASCII texts, which it splits several times faster.
    """
    separators = _character_class(
        character
        for character in map(chr, range(128 if is_ascii else 0x10000))
        if character in _IGNORED_SYMBOLS or unicodedata.category(character)[0] in "PZC"
    )
    operator = rf"[{re.escape(_OPERATORS)}](?=\s*\d)"
    if is_ascii:
        return re.compile(rf"[^{separators}]+|{operator}")
    return re.compile(rf"[{_IDEOGRAPHS}]|[^{separators}{_IDEOGRAPHS}]+|{operator}")


def _character_class(characters: Iterable[str]) -> str:
    """Return ascending characters as ranges, so that a match takes one comparison for each."""
    ranges: list[list[int]] = []
    for code in map(ord, characters):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(
        f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges
    )
