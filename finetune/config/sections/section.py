"""The base class of all sections."""

from typing import ClassVar, Literal

from finetune.errors import refusal

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Section:
    """A section of the config whose fields can be refused by their full keys."""

    section: ClassVar[str]
    """The path of the section's keys; empty for keys at the top level."""

    def require(
        self,
        field: str,
        holds: bool,
        allowed: str,
    ) -> None:
        """Refuse the value of a field unless a condition holds.

        Args:
            field: the name of the field.
            holds: the condition.
            allowed: what the field accepts, for the error message.

        Raises:
            ConfigError: the condition does not hold.
        """
        if not holds:
            key = f"{self.section}.{field}" if self.section else field
            raise refusal(key, getattr(self, field), allowed)
