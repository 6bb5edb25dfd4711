"""Config values as text that Hydra's override parser reads back as the same value."""

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig, ListConfig

from finetune.config.override_text import NULL, override_text


def encode(value: Any) -> Any:
    """Write a config value in Hydra's sweep syntax.

    Returns:
        Numbers and booleans unchanged; everything else as text, in quotes where Hydra needs them.
    """
    if value is None:
        return NULL
    if isinstance(value, Mapping | DictConfig):
        entries = []
        for key, item in value.items():
            entries.append(f"{key}:{encode(item)}")
        return f"{{{','.join(entries)}}}"
    if isinstance(value, list | tuple | ListConfig):
        items = [str(encode(item)) for item in value]
        return f"[{','.join(items)}]"
    plain = value.text if isinstance(value, QuotedString) else value
    return override_text(plain) if isinstance(plain, str) else plain
