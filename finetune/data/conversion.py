"""Conversion of raw rows to the common form, and the line that says how they were read."""

from typing import Any

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.class_names import ClassNames, name_classes
from finetune.data.columns import Cells, column_names
from finetune.data.formats import FORMATS, describe_format
from finetune.data.ignored import FIELDS, drop_ignored, expand_names
from finetune.data.layout import Layout, detect, find_layout
from finetune.data.messages import is_answer
from finetune.data.other_shapes import refuse_marked, refuse_media
from finetune.data.prompt_template import KEY as TEMPLATE_KEY
from finetune.data.prompt_template import PromptTemplate
from finetune.data.tool_calls import parse_list
from finetune.data.types import RawRow
from finetune.errors import ConfigError, did_you_mean, refusal


class RowFormats:
    """The conversion of all rows that a run reads.

    Args:
        settings: `format`, `text_field`, `columns`, `template`, `ignore` and `group_by`.

    Raises:
        ConfigError: `dataset.template` is no Jinja.
    """

    def __init__(self, settings: DatasetSettings) -> None:
        self.settings = settings
        source = settings.template
        self.template = None if source is None else PromptTemplate(source)
        self.ignored = expand_names(settings.ignore)
        self.unseen = (
            set(settings.ignore) - set(FIELDS) - {"reasoning_content", "thinking"}
        )
        self.logged: set[str] = set()
        self._seen_names: set[str] = set()

    def open(self, key: str, path: str) -> "RowConverter":
        """Return the converter of the rows of a path; the format is detected for each path."""
        return RowConverter(self, key, path)

    def see(self, row: RawRow) -> None:
        """Remember which ignored names a row's columns and messages have."""
        if not self.unseen:
            return
        names = set(row)
        for value in map(parse_list, row.values()):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    names |= item.keys()
        self.unseen -= names
        self._seen_names |= names

    def check_ignored(self) -> None:
        """Refuse a name of `dataset.ignore` that no row has. Call it when all rows are read."""
        for name in sorted(self.unseen):
            names = did_you_mean(name, {*FIELDS, *map(str, self._seen_names)})
            raise refusal(
                "dataset.ignore", f"[{name}]", f"no row has such a field; {names}"
            )


class RowConverter:
    """Converts the raw rows of one path.

    Args:
        formats: The conversion of all rows.
        key: The config key of the path, for messages.
        path: The path, for messages.
    """

    def __init__(
        self,
        formats: RowFormats,
        key: str,
        path: str,
    ) -> None:
        self._formats = formats
        self._settings = formats.settings
        self._key = key
        self._path = path
        self._layout: Layout | None = None
        self._used: dict[str, str] = {}
        self._unused: dict[str, None] = {}
        self._absent = dict(formats.settings.columns)
        self._fields = ""
        keys = {"role", "from", "content", "value", "tool_calls", "function_call"}
        self._ignored_keys = formats.ignored - keys

    @property
    def format(self) -> str | None:
        """The name of the rows' format, None before the first row."""
        return None if self._layout is None else self._layout.format

    def convert(
        self,
        row: RawRow,
        source: str,
        number: int,
        names: ClassNames | None = None,
    ) -> dict[str, Any] | None:
        """Convert a row to the common form.

        Args:
            row: The row as its file or the hub holds it.
            source: The file or data set of the row.
            number: The row's number in its source, from 1.
            names: The names of the classes that columns of the source hold as numbers.

        Returns:
            The row, whose chat ends with the last answer; None if there is nothing to learn.

        Raises:
            ConfigError: The row can't be read. The message names its place.
        """
        where = f"{self._key}={source}: row {number}"
        self._formats.see(row)
        row = self._prepare(row, names, where)
        if self._layout is None:
            self._layout = find_layout(self._settings, row, where)
            self._fields = column_names(row)
        layout = self._layout
        self._require_columns(layout, row, where)
        columns = layout.columns_of(row)
        content = FORMATS[layout.format].convert(
            Cells(row, columns, where, self._ignored_keys)
        )
        if content is not None:
            content = drop_ignored(content, self._settings.ignore)
        content, answered = _cut_after_last_answer(content)
        used = set(columns.values())
        refuse_media(row, used, where)
        if layout.format != "text":
            refuse_marked(row, used, answered, where)
        if content is None:
            self._refuse_mixture(layout, row, where)
        self._note_columns(row, columns)
        return content

    def finish(self) -> str | None:
        """Return a line on the format, which column is what, and which columns are not used.

        None if the same was said of another path.

        Raises:
            ConfigError: No row has a column that `dataset.columns` names.
        """
        if self._layout is None:
            return None
        for purpose, column in self._absent.items():
            reason = f"no row of {self._key}={self._path} has such a column"
            fields = f"the first row's fields: {self._fields}"
            raise refusal(f"dataset.columns.{purpose}", column, f"{reason}; {fields}")
        columns = ", ".join(
            column if purpose == column else f"{purpose}: {column}"
            for purpose, column in self._used.items()
        )
        not_used = (
            f"; not used: {', '.join(map(str, self._unused))}" if self._unused else ""
        )
        line = f"format {self._layout.format} ({columns}){not_used}"
        if line in self._formats.logged:
            return None
        self._formats.logged.add(line)
        return f"{self._key}={self._path}: {line}"

    def _prepare(
        self,
        row: RawRow,
        names: ClassNames | None,
        where: str,
    ) -> RawRow:
        """The row without ignored columns, with the names of classes and the template's prompt."""
        if names:
            row = name_classes(row, names, where)
        template = self._formats.template
        prompt = {} if template is None else {TEMPLATE_KEY: template.render(row, where)}
        ignored = self._formats.ignored
        if ignored or prompt:
            row = {
                column: value for column, value in row.items() if column not in ignored
            }
            row |= prompt
        return row

    def _require_columns(
        self,
        layout: Layout,
        row: RawRow,
        where: str,
    ) -> None:
        name = layout.missing_from(row)
        if name is None:
            return
        fields = f"its fields: {column_names(row)}"
        for purpose, column in self._settings.columns.items():
            if column == name:
                reason = f"{where} has no such column; {fields}"
                raise refusal(f"dataset.columns.{purpose}", column, reason)
        if layout.format == "chat":
            reason = f"has no list 'messages' or 'conversations'; {fields}"
        else:
            reason = f"has no field '{name}'; {fields}"
        needs = describe_format(layout.format, self._settings.text_field)
        raise ConfigError(f"{where} {reason}; format {needs}")

    def _refuse_mixture(
        self,
        layout: Layout,
        row: RawRow,
        where: str,
    ) -> None:
        """Refuse a row that holds nothing in the format of the first row, but is of another."""
        if (
            self._settings.format != "auto"
            or self._settings.columns
            or self._settings.template
        ):
            return
        usual = detect(row)
        if usual is not None and usual.format != layout.format:
            reason = f"has the columns of format {usual.format}, the first row of {layout.format}"
            raise ConfigError(
                f"{where} {reason}; all rows of a path must have one format"
            )

    def _note_columns(self, row: RawRow, columns: dict[str, str]) -> None:
        for purpose, column in columns.items():
            self._absent.pop(purpose, None)
            if row[column] is not None:
                self._used.setdefault(purpose, column)
        template = self._formats.template
        read = template.columns if template is not None else set()
        used = {*columns.values(), *read, self._settings.group_by}
        for column, value in row.items():
            if value is not None and column not in used:
                self._unused.setdefault(column)


def _cut_after_last_answer(
    content: dict[str, Any] | None,
) -> tuple[dict[str, Any] | None, bool]:
    """A chat without what follows its last answer, and whether the chat ended with it.

    The result is None if the chat has no answer to learn.
    """
    if content is None or "messages" not in content:
        return content, True
    messages = list(content["messages"])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    answered = len(messages) == len(content["messages"])
    if not any(is_answer(message) for message in messages):
        return None, answered
    return {**content, "messages": messages}, answered
