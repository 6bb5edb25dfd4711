"""Which format rows have, and which of their columns serves which purpose."""

from dataclasses import dataclass

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.columns import column_names
from finetune.data.formats import FORMATS, USUAL_COLUMNS, UsualColumns, describe_formats
from finetune.data.other_shapes import describe_shape
from finetune.data.prompt_template import KEY as TEMPLATE_KEY
from finetune.data.types import RawRow
from finetune.errors import ConfigError, refusal

PROMPT_NAMES = (
    "prompt",
    "question",
    "query",
    "instruction",
    "problem",
    "input",
    "text",
)
COMPLETION_NAMES = ("completion", "response", "answer", "output", "solution", "label")
"""Usual names of a column whose partner alone is named in `dataset.columns`."""

_Names = dict[str, tuple[str, ...]]
"""Names of columns by purpose."""


@dataclass(frozen=True)
class Layout:
    """The format of rows, and the names of the columns for each of its purposes."""

    format: str
    required: _Names
    optional: _Names

    def columns_of(self, row: RawRow) -> dict[str, str]:
        """Return the row's column for each purpose that it has one for: the first with a value."""
        columns = {}
        for purpose, names in (*self.required.items(), *self.optional.items()):
            present = [name for name in names if name in row]
            with_value = [name for name in present if row[name] is not None]
            if present:
                columns[purpose] = (with_value or present)[0]
        return columns

    def missing_from(self, row: RawRow) -> str | None:
        """Return the name of a required column that the row has not, None if it has all."""
        for names in self.required.values():
            if not any(name in row for name in names):
                return names[0]
        return None


def find_layout(settings: DatasetSettings, row: RawRow, where: str) -> Layout:
    """Return the layout of rows by the config and by the columns of the first row.

    The order: `dataset.columns` and `dataset.template`, `dataset.text_field` if it is not the
    default, then the usual columns in the order of `USUAL_COLUMNS`, then plain text.

    Args:
        settings: `format`, `columns`, `template`, `text_field` and `ignore`.
        row: The first row, without ignored columns.
        where: The row's place, to begin error messages with.

    Raises:
        ConfigError: The columns are those of no format, or not those that the config names.
    """
    given: _Names = {purpose: (column,) for purpose, column in settings.columns.items()}
    if settings.template is not None:
        given["prompt"] = (TEMPLATE_KEY,)
    name, required = _required_columns(settings, given, row, where)
    optional = dict(FORMATS[name].optional)
    for purpose, names in given.items():
        if purpose in required:
            required[purpose] = names
        elif purpose in optional:
            optional[purpose] = names
        else:
            key = (
                TEMPLATE_KEY
                if names == (TEMPLATE_KEY,)
                else f"dataset.columns.{purpose}"
            )
            value = settings.template if names == (TEMPLATE_KEY,) else names[0]
            purposes = ", ".join([*required, *optional])
            reason = (
                f"{where}: format {name} has no {purpose}; its purposes: {purposes}"
            )
            raise refusal(key, value, reason)
    for purpose in settings.ignore:
        optional.pop(purpose, None)
    return Layout(name, required, optional)


def detect(row: RawRow) -> UsualColumns | None:
    """Return the usual columns that a row has, None if it has none.

    Columns that hold null count as absent, unless no format fits without them.
    """
    for usual in USUAL_COLUMNS:
        columns = _present(usual, row)
        values = [row[column] is not None for column in columns]
        if columns and (all(values) if usual.needs_values else any(values)):
            return usual
    return None


def _required_columns(
    settings: DatasetSettings,
    given: _Names,
    row: RawRow,
    where: str,
) -> tuple[str, _Names]:
    """The format, and the names of its required columns by purpose."""
    text_field = settings.text_field
    if settings.format == "text":
        return "text", {"text": (text_field,)}
    if settings.format != "auto":
        return settings.format, _columns_of_format(settings.format, row)
    if "messages" in given:
        return "chat", {"messages": given["messages"]}
    if "prompt" in given or "completion" in given:
        return _completed_pair(settings, given, row, where)
    if text_field != "text" and text_field in row:
        return "text", {"text": (text_field,)}
    usual = detect(row)
    if usual is None and row.get(text_field) is None:
        usual = next((usual for usual in USUAL_COLUMNS if _present(usual, row)), None)
    if usual is not None:
        return usual.format, dict(usual.columns)
    if text_field in row:
        return "text", {"text": (text_field,)}
    shape = describe_shape(row)
    if shape is not None:
        raise ConfigError(f"{where}: {shape}; its fields: {column_names(row)}")
    raise _no_format(text_field, row, where)


def _no_format(text_field: str, row: RawRow, where: str) -> ConfigError:
    reason = f"{where} has the columns of no format; its fields: {column_names(row)}"
    keys = "dataset.columns, dataset.template and dataset.text_field name others"
    return ConfigError(f"{reason}; formats: {describe_formats(text_field)}; {keys}")


def _columns_of_format(name: str, row: RawRow) -> _Names:
    """The names of the required columns of a format: those that the row has, else the first."""
    choices = [usual for usual in USUAL_COLUMNS if usual.format == name]
    fitting = [usual for usual in choices if _present(usual, row)]
    return dict((fitting or choices)[0].columns)


def _completed_pair(
    settings: DatasetSettings,
    given: _Names,
    row: RawRow,
    where: str,
) -> tuple[str, _Names]:
    """The columns of prompt and completion, of which the config names one at least."""
    required = {}
    for purpose, usual in (("prompt", PROMPT_NAMES), ("completion", COMPLETION_NAMES)):
        names = given.get(purpose)
        if names is None:
            taken = {name for columns in given.values() for name in columns}
            free = [
                name
                for name in usual
                if row.get(name) is not None and name not in taken
            ]
            if not free:
                columns = column_names(row)
                reason = (
                    f"{where}: the {purpose} must be named too; its fields: {columns}"
                )
                raise refusal("dataset.columns", _shown(settings, given), reason)
            names = (free[0],)
        required[purpose] = names
    name = "alpaca" if required["prompt"] == ("instruction",) else "prompt_completion"
    return name, required


def _shown(settings: DatasetSettings, given: _Names) -> str:
    """The columns that the config names, as a user writes them."""
    pairs = ", ".join(f"{purpose}: {names[0]}" for purpose, names in given.items())
    return f"{{{pairs}}}"


def _present(usual: UsualColumns, row: RawRow) -> list[str]:
    """The row's columns of all purposes; none if a purpose lacks one."""
    columns = [
        [name for name in names if name in row] for names in usual.columns.values()
    ]
    return [name for names in columns for name in names] if all(columns) else []
