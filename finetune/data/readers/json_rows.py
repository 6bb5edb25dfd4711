"""Rows of JSON files: JSON lines, a list of objects, or an object with such a list."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.data.readers.cells import CHAT_COLUMNS
from finetune.data.readers.file import DataFile, UnreadableError, first_line
from finetune.data.readers.json_text import JsonContentError, parse_json
from finetune.data.readers.text import open_text
from finetune.data.types import BadRow, RawRow

_JSON_LINES = "a .jsonl file holds one object on each line"

_JSON = (
    "a .json file holds a list of objects, or one object on each line, "
    "or one object with a list of rows"
)

_ROW_KEYS = {"text", "prompt", "instruction", *CHAT_COLUMNS}
"""Keys of a row: an object that has one is a row, whatever lists it holds."""

_SPACE = re.compile(r"[ \t\n\r]*")


def read_json_lines(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    """Yield the object of each line."""
    with open_text(file, encoding) as lines:
        yield from _rows_of_lines(enumerate(lines, start=1), _JSON_LINES)


def read_json(file: DataFile, encoding: str | None) -> Iterator[RawRow]:
    """Yield the rows of a JSON file; a file of JSON lines is often called .json as well.

    JSON lines are read one by one; any other file is read whole.
    """
    with open_text(file, encoding) as lines:
        numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
        first = next(numbered, None)
        if first is None:
            return
        number, line = first
        if not line.lstrip().startswith("[") and _is_whole(line):
            second = next(numbered, None)
            if second is not None:
                yield from _rows_of_lines(
                    itertools.chain([first, second], numbered), _JSON
                )
                return
        text = "\n" * (number - 1) + line + lines.read()
    if text.lstrip().startswith("["):
        yield from _rows_of_list(text)
    else:
        yield from _rows_of_object(text, number)


def _rows_of_lines(lines: Iterable[tuple[int, str]], expected: str) -> Iterator[RawRow]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            reason = f"line {number} is no whole JSON object ({error.msg})"
            yield BadRow(f"{reason}; {expected}")
        except JsonContentError as error:
            yield BadRow(f"line {number} {error}")
        else:
            yield _row(value, f"line {number}", expected)


def _rows_of_list(text: str) -> Iterator[RawRow]:
    """The objects of a list, each parsed for itself, so that errors have its number."""
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    if text[position : position + 1] == "]":
        position += 1
    else:
        for number in itertools.count(1):
            try:
                _, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError:
                raise
            except (RecursionError, ValueError) as error:
                reason = f"row {number} can't be parsed ({first_line(error)})"
                raise UnreadableError(reason) from None
            yield _row_of_text(text[position:end], f"row {number}")
            position = _after_space(text, end)
            separator = text[position : position + 1]
            position += 1
            if separator == "]":
                break
            if separator != ",":
                raise json.JSONDecodeError(
                    "Expecting ',' delimiter", text, position - 1
                )
            position = _after_space(text, position)
    position = _after_space(text, position)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _row_of_text(text: str, where: str) -> RawRow:
    try:
        return _row(parse_json(text), where, _JSON)
    except JsonContentError as error:
        return BadRow(f"{where} {error}")


def _after_space(text: str, position: int) -> int:
    """The first position from `position` on that holds no white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _rows_of_object(text: str, first_line_number: int) -> Iterator[RawRow]:
    """The only row of a file, or the rows of the only list of rows in it."""
    where = f"line {first_line_number}"
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.lineno > first_line_number:
            raise
        raise UnreadableError(
            f"{where} is no whole JSON object ({error.msg}); {_JSON}"
        ) from None
    except JsonContentError as error:
        raise UnreadableError(f"{where} {error}") from None
    lists = _lists_of_rows(value)
    if len(lists) > 1:
        reason = f"one object with several lists of rows: {', '.join(lists)}"
        raise UnreadableError(f"{reason}; write each to a file")
    if lists:
        (key,) = lists
        for number, item in enumerate(value[key], start=1):
            yield _row(item, f"row {number} of '{key}'", _JSON)
    elif "\n" in text.strip():
        raise UnreadableError(
            f"{where} is no whole JSON object (it goes on below); {_JSON}"
        )
    else:
        yield _row(value, where, _JSON)


def _lists_of_rows(value: Any) -> list[str]:
    """The keys of an object whose values are lists of rows; none if the object is itself a row."""
    if not isinstance(value, dict) or _ROW_KEYS & set(value):
        return []
    return [
        key
        for key, items in value.items()
        if isinstance(items, list) and items and isinstance(items[0], dict)
    ]


def _row(value: Any, where: str, expected: str) -> RawRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"{where} is no JSON object; {expected}")


def _is_whole(line: str) -> bool:
    """Whether a line is JSON by itself."""
    try:
        parse_json(line)
    except json.JSONDecodeError:
        return False
    except JsonContentError:
        return True
    return True
