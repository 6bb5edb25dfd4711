"""Cells that hold JSON: chats, tools and histories are often written as text in a table."""

import json
from collections.abc import Iterable, Iterator

from finetune.data.readers.json_text import JsonContentError, parse_json
from finetune.data.types import BadRow, RawRow

CHAT_COLUMNS = {
    "messages", "conversations", "conversation", "dialog", "dialogue", "history", "tools",
    "functions", "tool_calls",
}  # fmt: skip
"""Columns whose cells are lists or objects. A prompt or an answer that is JSON stays text."""


def parse_cells(rows: Iterable[RawRow], columns: set[str]) -> Iterator[RawRow]:
    """Yield rows, with texts that are a whole JSON list or object parsed in some columns.

    Args:
        rows: Raw rows.
        columns: The columns in which texts are parsed. A text that is no JSON stays as it is.
    """
    for number, row in enumerate(rows, start=1):
        yield _parse_row(row, columns, number)


def _parse_row(row: RawRow, columns: set[str], number: int) -> RawRow:
    parsed = {}
    for column in columns & row.keys():
        cell = row[column]
        if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
            continue
        try:
            parsed[column] = parse_json(cell)
        except json.JSONDecodeError:
            continue
        except JsonContentError as error:
            return BadRow(f"row {number}: column '{column}' {error}")
    return {**row, **parsed} if parsed else row
