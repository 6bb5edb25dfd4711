"""Read the rows of one path in the common form."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.conversion import RowFormats
from finetune.data.report import Report
from finetune.data.sources import Source, open_files, open_source
from finetune.data.split_files import file_names
from finetune.data.types import BadRow, RawRow, Row, SkippedRow
from finetune.errors import ConfigError, refusal


@dataclass
class ReadRows:
    """Rows in the common form, and which of them belong together."""

    rows: list[Row] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    """The value of `dataset.group_by` of each row; None: the row belongs to no group."""

    def append(self, row: Row, group: str | None) -> None:
        """Add a row."""
        self.rows.append(row)
        self.groups.append(group)

    def extend(self, rows: "ReadRows") -> None:
        """Add the rows of another source."""
        self.rows += rows.rows
        self.groups += rows.groups

    def __len__(self) -> int:
        return len(self.rows)


def read_path(
    key: str,
    path: str,
    files: list[Path] | None,
    formats: RowFormats,
    report: Report,
) -> ReadRows:
    """Read all rows of a path in the common form.

    Args:
        key: The config key of the path, for error messages.
        path: A folder, or anything else that `dataset.path` may be.
        files: The files to read if the path is a folder, else None.
        formats: The conversion of the rows; the first row decides the format of all.
        report: Where rows that are left out are counted, and the commit of a data set on the hub.

    Raises:
        ConfigError: A file or, unless bad rows are skipped, a row can't be read; no row is left.
    """
    settings = formats.settings
    if files is None:
        sources = [open_source(key, path, settings)]
        shown_path = path
    else:
        sources = open_files(key, path, files, settings)
        shown_path = f"{path} ({file_names(files)})"
    reader = _Reader(key, shown_path, formats)
    for source in sources:
        reader.read(source)
        if source.commit is not None:
            report.commits[path] = source.commit
    total, skipped, rows = reader.total, reader.skipped, reader.rows
    if not total:
        raise refusal(key, shown_path, "holds no rows")
    if len(skipped) == total:
        first = skipped[0]
        where = f"row {first.number} of {first.source}"
        reason = f"none of {total} rows can be read; the first, {where}: {first.reason}"
        raise refusal(key, shown_path, reason)
    report.skip(shown_path, skipped)
    format_line = reader.converter.finish()
    if format_line is not None:
        report.note_format(format_line)
    empty = total - len(skipped) - len(rows)
    report.drop(f"rows of {shown_path} with nothing to learn from", empty)
    if not rows:
        reason = f"no rows are left: none of {empty} has any text to learn from"
        raise refusal(key, shown_path, reason)
    return rows


class _Reader:
    """Converts the rows of the sources of one path, which have one format.

    Args:
        key: The config key of the path, for error messages.
        path: The path, for error messages.
        formats: The conversion of the rows, and what happens to bad rows.
    """

    def __init__(
        self,
        key: str,
        path: str,
        formats: RowFormats,
    ) -> None:
        self._key = key
        self._settings = formats.settings
        self.converter = formats.open(key, path)
        self.rows = ReadRows()
        self.skipped: list[SkippedRow] = []
        self.total = 0

    def read(self, source: Source) -> None:
        """Convert the rows of a source.

        Raises:
            ConfigError: A row is bad and `dataset.on_bad_row` is `refuse`; the message names it.
        """
        for number, raw_row in enumerate(source.rows, start=1):
            self.total += 1
            try:
                self._convert(source, number, raw_row)
            except ConfigError as error:
                if self._settings.on_bad_row == "refuse":
                    raise
                reason = _without_place(str(error), self._key, source.name, number)
                self.skipped.append(SkippedRow(source.name, number, reason))

    def _convert(
        self,
        source: Source,
        number: int,
        raw_row: RawRow,
    ) -> None:
        if isinstance(raw_row, BadRow):
            raise refusal(self._key, source.name, raw_row.reason)
        # The group's column is read first, as the conversion may leave it out.
        group = self._group(f"{self._key}={source.name}: row {number}", raw_row)
        content = self.converter.convert(
            raw_row, source.name, number, source.class_names
        )
        if content is not None:
            row = Row(content, source.name, number, self.converter.format or "")
            self.rows.append(row, group)

    def _group(self, where: str, raw_row: RawRow) -> str | None:
        """The value of the row's column `dataset.group_by`, as text."""
        column = self._settings.group_by
        if column is None:
            return None
        if column not in raw_row:
            columns = ", ".join(map(str, raw_row))
            reason = f"{where} has no such column; its columns: {columns}"
            raise refusal("dataset.group_by", column, reason)
        value = raw_row[column]
        return None if value is None else json.dumps(value, sort_keys=True, default=str)


def _without_place(
    message: str,
    key: str,
    name: str,
    number: int,
) -> str:
    """The message of an error without the place of the row, which is listed beside it."""
    for place in (f"{key}={name}: row {number}", f"{key}={name}"):
        message = message.removeprefix(place)
    return message.lstrip(": ")
