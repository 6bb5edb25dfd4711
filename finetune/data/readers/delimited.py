"""Rows of .csv, .tsv and .txt files."""

import csv
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TextIO

from finetune.data.readers.file import DataFile, UnreadableError
from finetune.data.readers.text import open_text
from finetune.data.types import BadRow, RawRow

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
"""Of .csv files, the usual first."""

_SAMPLE_LINES = 200


def read_csv(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    """Yield the records of a CSV file, whose first lines show the delimiter."""
    with open_text(file, encoding, newline="") as text:
        sample = list(itertools.islice(text, _SAMPLE_LINES))
        delimiter = _find_delimiter(sample)
        yield from _read_records(itertools.chain(sample, text), delimiter)


def read_tsv(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    """Yield the records of a file whose cells are separated by tabs."""
    with open_text(file, encoding, newline="") as text:
        yield from _read_records(text, "\t")


def read_lines(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    """Yield each line of a text file as the column `text`; blank lines are left out."""
    with open_text(file, encoding) as text:
        yield from _rows_of_text(text)


def _rows_of_text(text: TextIO) -> Iterator[RawRow]:
    for line in text:
        if line.strip():
            yield {"text": line.rstrip("\n")}


def _find_delimiter(sample: list[str]) -> str:
    """The delimiter of a CSV file by its first lines.

    It divides the header, and all records into as many cells, or at least most of them. The comma
    is tried first, and taken if none does: such a file has one column.
    """
    shares = {delimiter: _like_header(sample, delimiter) for delimiter in _DELIMITERS}
    for enough in (1.0, 0.5):
        for delimiter, share in shares.items():
            if share >= enough:
                return delimiter
    return ","


def _like_header(sample: list[str], delimiter: str) -> float:
    """The share of records with as many cells as the header; 0 if it has only one."""
    try:
        counts = [
            len(record) for record in csv.reader(sample, delimiter=delimiter) if record
        ]
    except csv.Error:
        return 0.0
    if len(sample) == _SAMPLE_LINES and len(counts) > 1:
        counts.pop()  # the sample can end within a record
    if not counts or counts[0] == 1:
        return 0.0
    return counts.count(counts[0]) / len(counts)


class _RecordLines:
    """The lines of a file, of which those of the current record are kept."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.record.append(line)
        return line


def _read_records(text: Iterable[str], delimiter: str) -> Iterator[RawRow]:
    """Yield records as rows.

    A record with more or fewer cells than the header is refused: a delimiter within a cell, or a
    cell without its end, would move what follows to other columns.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _RecordLines(text)
    reader = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    first_line = 1
    try:
        for record in reader:
            if _is_unfinished(lines.record, delimiter):
                reason = f"line {first_line} begins a record with a quote that is never closed"
                raise UnreadableError(reason)
            if header is None and record:
                header = _require_names(record, first_line)
            elif header is not None and len(record) == len(header):
                yield dict(zip(header, record, strict=True))
            elif header is not None and record:
                counts = f"{len(record)} cells, the header {len(header)}"
                quoting = (
                    f"a cell that holds a {_DELIMITERS[delimiter]} stands in quotes"
                )
                yield BadRow(f"line {first_line} has {counts}; {quoting}")
            first_line = reader.line_num + 1
            lines.record.clear()
    except csv.Error as error:
        raise UnreadableError(
            f"line {reader.line_num} is broken CSV ({error})"
        ) from None


def _require_names(header: list[str], line: int) -> list[str]:
    """Return the header, if it names columns and none of them twice.

    Columns without a name are read: pandas writes its index so.
    """
    if not any(name.strip() for name in header):
        raise UnreadableError(f"line {line}, the header, names no column")
    repeated = [
        name for name, count in Counter(header).items() if name.strip() and count > 1
    ]
    if repeated:
        raise UnreadableError(f"line {line}, the header, names '{repeated[0]}' twice")
    return header


def _is_unfinished(lines: list[str], delimiter: str) -> bool:
    """Whether the lines of a record end within quotes: it then is the last of its file."""
    if sum(line.count('"') for line in lines) % 2 == 0:
        return False
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False
