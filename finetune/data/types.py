"""Rows of a data set in the common form, and their fingerprint."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

RawRow = dict[str, Any]
"""A row as its file holds it: the value of each column."""


class BadRow(RawRow):
    """An empty row in place of one that can't be read, where `dataset.on_bad_row` is `skip`.

    Args:
        reason: Why it can't be read, with its line or number, without the file's name.
    """

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


Message = dict[str, Any]
"""A turn of a chat in the common form.

`role` and `content`; where the row has them `reasoning_content`, `thinking`, `tool_calls`,
`tool_call_id`, `name`; and `train: False` on an assistant's message that is not to be learnt.
"""

MESSAGE_KEYS = frozenset(
    "role content reasoning_content thinking tool_calls tool_call_id name train".split()
)

Messages = list[Message]


class Row(dict[str, Any]):
    """A row in the common form: `{"text": …}`, or `{"messages": […]}` and perhaps `"tools": […]`.

    Args:
        content: The row.
        source: The file or data set that the row comes from.
        number: The row's number in its source, from 1.
        format_name: The name of the format in which its source has it.
    """

    __slots__ = ("format_name", "number", "source")

    def __init__(
        self,
        content: dict[str, Any],
        source: str = "",
        number: int = 0,
        format_name: str = "",
    ) -> None:
        super().__init__(content)
        self.format_name = format_name
        self.source = source
        self.number = number

    @property
    def place(self) -> str:
        """Where the row stands, as error messages name it."""
        return f"{self.source}: row {self.number}"


@dataclass(frozen=True)
class Prompt:
    """A question to be answered, asked as rows ask it."""

    text: str
    """The question; without a chat template the text to continue."""
    system: str | None = None
    """The system turn before it."""
    tools: list[Any] | None = None
    """Schemas of the tools that the model may call."""
    messages: Messages | None = None
    """The whole chat up to the answer, in place of `text` and `system`; None: there are no earlier
    turns."""


@dataclass(frozen=True)
class SkippedRow:
    """A row that `dataset.on_bad_row=skip` left out."""

    source: str
    """The file or data set."""
    number: int
    """The row's number in its source, from 1."""
    reason: str


def canonical_text(content: object) -> str:
    """Return plain values as JSON that is the same whatever the order of their keys."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def fingerprint(content: object) -> str:
    """Return a hash of plain values, 16 hexadecimal digits."""
    return hashlib.sha256(canonical_text(content).encode()).hexdigest()[:16]


class ListDigest:
    """The `fingerprint` of a list of lists, whose items are added one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lists = 0
        self._items = 0

    def begin_list(self) -> None:
        """Begin the next list."""
        self._digest.update(b"], [" if self._lists else b"[[")
        self._lists += 1
        self._items = 0

    def update(self, text: str) -> None:
        """Add an item to the list.

        Args:
            text: The item's `canonical_text`.
        """
        separator = ", " if self._items else ""
        self._digest.update(f"{separator}{text}".encode())
        self._items += 1

    @property
    def fingerprint(self) -> str:
        """The fingerprint of at least one list, 16 hexadecimal digits."""
        digest = self._digest.copy()
        digest.update(b"]]")
        return digest.hexdigest()[:16]
