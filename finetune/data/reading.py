"""Read the rows of one path in the common form."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.conversion import RowFormats
from finetune.data.duplicates import group_key
from finetune.data.report import LISTED_ROWS, Report
from finetune.data.row_file import RowWriter
from finetune.data.sources import Source, open_files, open_source
from finetune.data.split_files import file_names
from finetune.data.types import BadRow, RawRow, Row, SkippedRow
from finetune.errors import ConfigError, refusal


@dataclass(frozen=True)
class OpenedPath:
    """A path whose rows are to be read."""

    key: str
    """The config key of the path, for error messages."""
    path: str
    """A folder, or anything else that `dataset.path` may be."""
    shown_path: str
    """The path as messages show it, with the names of its files."""
    sources: list[Source]

    @property
    def identity(self) -> list[str | None]:
        """What tells whether its rows are those that were read before."""
        names = [self.key, self.path, self.shown_path]
        identities = [source.identity for source in self.sources]
        return [*names, *(source.name for source in self.sources), *identities]


def open_path(
    key: str, path: str, files: list[Path] | None, settings: DatasetSettings
) -> OpenedPath:
    """Open a path; its rows are read later.

    Args:
        key: The config key of the path, for error messages.
        path: A folder, or anything else that `dataset.path` may be.
        files: The files to read if the path is a folder, else None.
        settings: How data sets on the hub and text files are read.

    Raises:
        ConfigError: There is no such file or data set.
    """
    if files is None:
        return OpenedPath(
            key,
            path,
            path,
            [open_source(key, path, settings)],
        )
    sources = open_files(key, path, files, settings)
    return OpenedPath(
        key,
        path,
        f"{path} ({file_names(files)})",
        sources,
    )


def read_path(
    opened: OpenedPath, formats: RowFormats, report: Report, writer: RowWriter
) -> None:
    """Read all rows of a path in the common form.

    Args:
        opened: The path.
        formats: The conversion of the rows; the first row decides the format of all.
        report: Where rows that are left out are counted, and the commit of a data set on the hub.
        writer: Takes the rows.

    Raises:
        ConfigError: A file or, unless bad rows are skipped, a row can't be read; no row is left.
    """
    key, shown_path = opened.key, opened.shown_path
    first = len(writer)
    reader = _Reader(key, shown_path, formats, writer)
    for source in opened.sources:
        reader.read(source)
        if source.commit is not None:
            report.commits[opened.path] = source.commit
    total, skipped = reader.total, reader.skipped
    if not total:
        raise refusal(key, shown_path, "holds no rows")
    if reader.skipped_count == total:
        row = skipped[0]
        where = f"row {row.number} of {row.source}"
        reason = f"none of {total} rows can be read; the first, {where}: {row.reason}"
        raise refusal(key, shown_path, reason)
    report.skip(shown_path, skipped, reader.skipped_count)
    format_line = reader.converter.finish()
    if format_line is not None:
        report.note_format(format_line)
    rows = len(writer) - first
    empty = total - reader.skipped_count - rows
    report.drop(f"rows of {shown_path} with nothing to learn from", empty)
    if not rows:
        reason = f"no rows are left: none of {empty} has any text to learn from"
        raise refusal(key, shown_path, reason)


class _Reader:
    """Converts the rows of the sources of one path, which have one format.

    Args:
        key: The config key of the path, for error messages.
        path: The path, for error messages.
        formats: The conversion of the rows, and what happens to bad rows.
        writer: Takes the rows.
    """

    def __init__(
        self,
        key: str,
        path: str,
        formats: RowFormats,
        writer: RowWriter,
    ) -> None:
        self._key = key
        self._settings = formats.settings
        self.converter = formats.open(key, path)
        self._writer = writer
        self.skipped: list[SkippedRow] = []
        """The first skipped rows."""
        self.skipped_count = 0
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
                reason = _without_place(
                    str(error),
                    self._key,
                    source.name,
                    number,
                )
                self.skipped_count += 1
                if len(self.skipped) < LISTED_ROWS:
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
        where = f"{self._key}={source.name}: row {number}"
        group = self._group(where, raw_row, source.group_column)
        if source.group_column is not None:
            raw_row = {**raw_row}
            del raw_row[source.group_column]
        content = self.converter.convert(
            raw_row, source.name, number, source.class_names
        )
        if content is not None:
            row = Row(
                content,
                source.name,
                number,
                self.converter.format or "",
            )
            try:
                self._writer.append(row, group_key(group))
            except TypeError:
                raise _no_json(row, where) from None

    def _group(
        self, where: str, raw_row: RawRow, source_column: str | None
    ) -> str | None:
        """The value of the row's column `dataset.group_by`, or else of the source's, as text."""
        column = self._settings.group_by or source_column
        if column is None:
            return None
        if column not in raw_row:
            columns = ", ".join(map(str, raw_row))
            reason = f"{where} has no such column; its columns: {columns}"
            raise refusal("dataset.group_by", column, reason)
        value = raw_row[column]
        return None if value is None else json.dumps(value, sort_keys=True, default=str)


def _no_json(row: Row, where: str) -> ConfigError:
    """The refusal of a row with a value that JSON does not have, such as a date of Parquet."""
    path: list[str] = []
    value: Any = row
    while isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value, start=1)
        key, value = next(pair for pair in pairs if not _is_json(pair[1]))
        path.append(str(key))
    *outer, field = path
    reason = f"is no text, number, list or object but {type(value).__name__}"
    is_of_message = path[0] == "messages" and len(path) == 3
    remedy = f"; dataset.ignore=[{field}] leaves it out" if is_of_message else ""
    return ConfigError(f"{where}, {' '.join(outer)}: field '{field}' {reason}{remedy}")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _without_place(
    message: str,
    key: str,
    name: str,
    number: int,
) -> str:
    """The message of an error without the place of the row, which is listed beside it."""
    for place in (f"{key}={name}: row {number}", f"{key}={name}"):
        message = message.removeprefix(place)
    return message.lstrip(":, ")
