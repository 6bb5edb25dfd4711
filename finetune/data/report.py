"""What is said about the rows of a run: in the log, in `result.json` and in the preview."""

import logging
from dataclasses import dataclass, field

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

    def drop(self, reason: str, count: int) -> None:
        """Count rows that are left out."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def skip(self, path: str, rows: list[SkippedRow]) -> None:
        """Count, list and log the bad rows of a path."""
        self.drop(f"bad rows of {path} (dataset.on_bad_row=skip)", len(rows))
        self.skipped += rows[: LISTED_ROWS - len(self.skipped)]
        for row in rows[:LOGGED_ROWS]:
            log.info("data: bad row %d of %s: %s", row.number, row.source, row.reason)

    def note_format(self, line: str) -> None:
        """Log a line about the format of rows, and keep it."""
        log.info("data: %s", line)
        self.formats.append(line)

    def note(self, line: str) -> None:
        """Log a line about the split, and keep it."""
        log.info("data: %s", line)
        self.notes.append(line)

    def log_dropped(self) -> None:
        """Log how many rows were left out, by reason."""
        for reason, count in self.dropped.items():
            log.info("data: left out %d %s", count, reason)
