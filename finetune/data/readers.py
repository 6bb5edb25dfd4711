"""Read raw rows from files: JSON lines, JSON, CSV and Parquet.

To add a file type: write a function from a path to its rows, add it to `READERS`, and add its
suffix to `SUFFIXES` of `finetune/config/data_folder.py`. `_csv` is an example.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.config.data_folder import SUFFIXES
from finetune.data.types import BadRow, RawRow
from finetune.errors import refusal


def read_file(key: str, file: Path) -> Iterator[RawRow | BadRow]:
    """Yield the raw rows of a file, and a `BadRow` in the place of each that can't be read.

    Args:
        key: The config key that names the file, for error messages.
        file: A file with one of `SUFFIXES`.

    Raises:
        ConfigError: The file is empty, of another type, or broken as a whole.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise refusal(key, str(file), f"must be a {' '.join(SUFFIXES)} file")
    if file.stat().st_size == 0:
        raise refusal(key, str(file), "the file is empty")
    try:
        yield from reader(file)
    except _UnreadableError as error:
        raise refusal(key, str(file), str(error)) from None
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text ({error.reason} at byte {error.start})"
        raise refusal(key, str(file), reason) from None
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} is broken JSON ({error.msg})"
        raise refusal(key, str(file), reason) from None


class _UnreadableError(Exception):
    """What is wrong with a file; `read_file` adds the key and the file's name."""


_JSON_LINES = "a .jsonl file holds one object on each line"


def _json_lines(file: Path, expected: str = _JSON_LINES) -> Iterator[RawRow | BadRow]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"line {number} is no whole JSON object ({error.msg})"
                yield BadRow(f"{reason}; {expected}")
                continue
            yield _require_object(row, _may_hold_surrogates(line), f"line {number}", expected)


def _json_list(file: Path) -> Iterator[RawRow | BadRow]:
    """A JSON list of objects; a file of JSON lines is often called .json as well."""
    expected = "a .json file holds a list of objects, or one object on each line"
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, expected)
        return
    surrogates = _may_hold_surrogates(text)
    for number, row in enumerate(json.loads(text), start=1):
        yield _require_object(row, surrogates, f"row {number}", expected)


def _may_hold_surrogates(text: str) -> bool:
    """Whether JSON text has an escape of a surrogate (U+D800 to U+DFFF)."""
    return "\\ud" in text.lower()


def _require_object(
    row: object, check_surrogates: bool, where: str, expected: str
) -> RawRow | BadRow:
    """Return a `BadRow` for a value that is no object, and for one with half a surrogate pair.

    JSON can escape half a pair, but it can't be encoded as UTF-8, so no tokenizer takes it.
    """
    if not isinstance(row, dict):
        return BadRow(f"{where} is no JSON object; {expected}")
    if check_surrogates:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return BadRow(f"{where} has half a surrogate pair, which is no text")
    return row


def _csv(file: Path) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            yield from reader
        except csv.Error as error:
            reason = f"line {reader.line_num} is broken CSV ({error})"
            raise _UnreadableError(reason) from None


def _parquet(file: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        return iter(pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowInvalid as error:
        reason = f"no readable Parquet file ({str(error).splitlines()[0]})"
        raise _UnreadableError(reason) from None


READERS: dict[str, Callable[[Path], Iterator[RawRow | BadRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""The readers by file suffix."""
