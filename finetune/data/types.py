"""Rows of a data set in the common form, and their fingerprint."""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class SkippedRow:
    """A row that `dataset.on_bad_row=skip` left out."""

    source: str
    """The file or data set."""
    number: int
    """The row's number in its source, from 1."""
    reason: str


@dataclass(frozen=True)
class Rows:
    """The rows of a run in the common form, by split."""

    train: list[Row]
    evaluation: list[Row]
    test: list[Row]
    dropped: dict[str, int]
    """How many rows were left out, by reason."""
    skipped: list[SkippedRow] = field(default_factory=list)
    """The first rows that `dataset.on_bad_row=skip` left out; `dropped` counts all."""
    notes: list[str] = field(default_factory=list)
    """What the log says about the split: tied rows, weights, limits."""
    commits: dict[str, str] = field(default_factory=dict)
    """The commits of the data sets on the hub, by `dataset.path`."""
    formats: list[str] = field(default_factory=list)
    """What the log says about formats: which column is what, and which are not used."""

    @property
    def counts(self) -> dict[str, object]:
        """The number of rows of each split, and of those left out by reason, for `result.json`.

        Skipped rows, notes and commits are listed where there are any.
        """
        sizes = {
            "train": len(self.train),
            "eval": len(self.evaluation),
            "test": len(self.test),
        }
        lists = {
            "skipped": [dataclasses.asdict(row) for row in self.skipped],
            "notes": self.notes,
            "commits": self.commits,
        }
        return {
            **sizes,
            "dropped": self.dropped,
            **{k: v for k, v in lists.items() if v},
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every row of every split."""
        return fingerprint([self.train, self.evaluation, self.test])


def fingerprint(content: object) -> str:
    """Return a hash of plain values, 16 hexadecimal digits."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
