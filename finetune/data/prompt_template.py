"""The prompt that `dataset.template` makes of a row's columns."""

from finetune.data.columns import column_names
from finetune.data.types import RawRow
from finetune.errors import ConfigError, refusal

KEY = "dataset.template"


class PromptTemplate:
    """A Jinja template over the columns of a row, in Jinja's sandbox.

    `columns` are the names of the columns that it reads.

    Args:
        source: The template.

    Raises:
        ConfigError: The template is no Jinja.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import SandboxedEnvironment

        self._source = " ".join(source.split())
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True
        )
        try:
            self._template = environment.from_string(source)
            self.columns: set[str] = meta.find_undeclared_variables(
                environment.parse(source)
            )
        except TemplateSyntaxError as error:
            reason = f"must be a Jinja template ({error.message})"
            raise refusal(KEY, self._source, reason) from None

    def render(self, row: RawRow, where: str) -> str:
        """Return the prompt of a row; null counts as empty.

        Raises:
            ConfigError: The row lacks a column, or the template can't be rendered with the row.
        """
        values = {key: "" if value is None else value for key, value in row.items()}
        try:
            return self._template.render(values)
        except Exception as error:  # the template may do anything with a row's values
            reason = " ".join(str(error).split()) or type(error).__name__
            fields = f"its fields: {column_names(row)}"
            raise ConfigError(
                f"{KEY}={self._source}: {where}: {reason}; {fields}"
            ) from None
