"""The values of a row by their purpose, whatever the names of its columns are."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.data.tool_calls import normalize_tools, parse_json
from finetune.data.types import RawRow
from finetune.errors import ConfigError


@dataclass(frozen=True)
class Cells:
    """The values of one row by purpose, for example prompt, completion and system."""

    row: RawRow
    columns: Mapping[str, str]
    """The column of each purpose; purposes that the row has no column for are missing."""
    where: str
    """The key, the file and the number of the row, to begin error messages with."""
    ignored: Collection[str] = ()
    """Keys of messages that `dataset.ignore` leaves out."""

    def value(self, purpose: str) -> Any:
        """Return a value, None if the row has no such column."""
        return self.row.get(self.columns.get(purpose, ""))

    def text(self, purpose: str) -> str:
        """Return a text; null, and a column that the row has not, count as empty.

        Raises:
            ConfigError: The value is no text.
        """
        value = self.value(purpose)
        if value is None:
            return ""
        if not isinstance(value, str):
            name = self.columns[purpose]
            raise ConfigError(
                f"{self.where}: field '{name}' is no text but {type(value).__name__}"
            )
        return value

    def answer(self) -> str:
        """Return the completion as text; a whole number or a boolean is written as text.

        Raises:
            ConfigError: The value is neither.
        """
        value = self.value("completion")
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return str(value)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            return str(int(value))
        if value is None or isinstance(value, str):
            return value or ""
        kind = f"no text and no whole number but {type(value).__name__}"
        column = self.columns["completion"]
        text_alone = (
            "; dataset.format=text learns the text alone" if column == "label" else ""
        )
        raise ConfigError(f"{self.where}: field '{column}' is {kind}{text_alone}")

    def list_or_null(self, purpose: str) -> Any:
        """Return a value that may be JSON text; an empty one counts as null."""
        value = self.value(purpose)
        if isinstance(value, str):
            value = parse_json(value, self.place(purpose)) if value.strip() else None
        return value or None

    def tools(self) -> dict[str, Any]:
        """Return `{"tools": …}` in the common form, nothing if the row has no tools."""
        value = self.list_or_null("tools")
        return (
            {}
            if value is None
            else {"tools": normalize_tools(value, self.place("tools"))}
        )

    def place(self, purpose: str) -> str:
        """Return where the value stands, as error messages name it."""
        return f"{self.where}: column '{self.columns[purpose]}'"


def column_names(row: RawRow) -> str:
    """Return the names of a row's columns, as error messages list them."""
    return ", ".join(map(str, row))
