"""What is said about the rows of a run: in the log, in `result.json` and in the preview."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from finetune.data.types import SkippedRow

log = logging.getLogger("finetune.data.rows")

LISTED_ROWS = 20
"""Skipped rows that `result.json` lists."""

LOGGED_ROWS = 3
"""Skipped rows of a source that the log shows."""


@dataclass
class Report:
    """Collects what happens to rows while they are read and split."""

    dropped: dict[str, int] = field(default_factory=dict)
    """How many rows were left out, by reason."""
    skipped: list[SkippedRow] = field(default_factory=list)
    """The first rows that `dataset.on_bad_row=skip` left out."""
    notes: list[str] = field(default_factory=list)
    """Lines of the log about the split."""
    formats: list[str] = field(default_factory=list)
    """Lines of the log about the formats of rows: which column is what."""
    commits: dict[str, str] = field(default_factory=dict)
    """The commits of data sets on the hub, by path."""
    lines: list[str] = field(default_factory=list)
    """All lines of the log, in order; rows that come from the cache are reported by them."""

    def drop(self, reason: str, count: int) -> None:
        """Count rows that are left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def skip(self, path: str, rows: list[SkippedRow], count: int) -> None:
        """Count, list and log the bad rows of a path.

        Args:
            path: The path as messages show it.
            rows: The first of them, at least `LISTED_ROWS` where there are as many.
            count: The number of all.
        """
        self.drop(f"bad rows of {path} (dataset.on_bad_row=skip)", count)
        self.skipped += rows[: LISTED_ROWS - len(self.skipped)]
        for row in rows[:LOGGED_ROWS]:
            self._log(f"bad row {row.number} of {row.source}: {row.reason}")

    def note_format(self, line: str) -> None:
        """Log a line about the format of rows, and keep it."""
        self._log(line)
        self.formats.append(line)

    def note(self, line: str) -> None:
        """Log a line about the split, and keep it."""
        self._log(line)
        self.notes.append(line)

    def log_dropped(self) -> None:
        """Log how many rows were left out, by reason."""
        for reason, count in self.dropped.items():
            self._log(f"left out {count} {reason}")

    def repeat(self, start: int = 0) -> None:
        """Log the lines again that were logged when the rows were read.

        Args:
            start: How many of them to leave out.
        """
        for line in self.lines[start:]:
            log.info("data: %s", line)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Return the report that `to_dict` has made values of."""
        skipped = [SkippedRow(**row) for row in values["skipped"]]
        return cls(**{**values, "skipped": skipped})

    def _log(self, line: str) -> None:
        log.info("data: %s", line)
        self.lines.append(line)
