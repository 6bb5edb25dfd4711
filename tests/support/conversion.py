"""Raw rows converted to the common form, without files."""

import dataclasses
from functools import cache
from typing import Any

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.conversion import RowConverter, RowFormats
from support.configs import compose
from support.rows import Row


@cache
def _defaults() -> DatasetSettings:
    return compose("dataset.path=rows.jsonl").dataset


def open_converter(**changes: Any) -> tuple[RowFormats, RowConverter]:
    """The conversion of the rows of `dataset.path=rows.jsonl`, and its converter."""
    formats = RowFormats(dataclasses.replace(_defaults(), **changes))
    return formats, formats.open("dataset.path", "rows.jsonl")


def format_line(*rows: Row, **changes: Any) -> str | None:
    """The line that says how rows are read."""
    _, converter = open_converter(**changes)
    for number, row in enumerate(rows, start=1):
        converter.convert(row, "rows.jsonl", number)
    return converter.finish()


def convert(*rows: Row, **changes: Any) -> list[Row]:
    """Rows in the common form, with changed settings; rows with nothing to learn are left out."""
    formats, converter = open_converter(**changes)
    contents = [
        converter.convert(row, "rows.jsonl", n) for n, row in enumerate(rows, start=1)
    ]
    converter.finish()
    formats.check_ignored()
    return [content for content in contents if content is not None]
