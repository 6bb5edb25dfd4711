"""Errors of exports."""

from finetune.errors import ConfigError


class ExportError(ConfigError):
    """A model that can't be written as a GGUF file. The message is the reason, without the run."""
