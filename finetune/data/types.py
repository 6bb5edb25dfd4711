"""Rows of a data set in the common form, and their fingerprint."""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""A row as a file holds it, or in the common form: `{"text": …}` or `{"messages": […]}`."""

Messages = list[dict[str, str]]
"""The turns of a chat, each with `role` and `content`."""


@dataclass(frozen=True)
class Rows:
    """The rows of a run in the common form, by split."""

    train: list[Row]
    evaluation: list[Row]
    test: list[Row]
    dropped: dict[str, int]
    """How many rows were left out, by reason."""

    @property
    def counts(self) -> dict[str, object]:
        """The number of rows of each split, and of those left out by reason, for `result.json`."""
        sizes = {"train": len(self.train), "eval": len(self.evaluation), "test": len(self.test)}
        return {**sizes, "dropped": self.dropped}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every row of every split."""
        return fingerprint([self.train, self.evaluation, self.test])


def fingerprint(content: object) -> str:
    """Return a hash of plain values, 16 hexadecimal digits."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
