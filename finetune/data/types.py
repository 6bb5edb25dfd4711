"""Rows of a data set in the common form, and their fingerprint."""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rows:
    """The rows of a run, in one form: `text`, or `messages` of `role` and `content`."""

    train: list[Row]
    evaluation: list[Row]
    test: list[Row]
    dropped: dict[str, int]
    """How many rows were left out, by reason."""

    @property
    def counts(self) -> dict[str, object]:
        """Rows in each part, and what was left out."""
        sizes = {"train": len(self.train), "eval": len(self.evaluation), "test": len(self.test)}
        return {**sizes, "dropped": self.dropped}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every row of every part."""
        return fingerprint([self.train, self.evaluation, self.test])


def fingerprint(content: object) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]
