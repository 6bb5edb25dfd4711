"""Config values as text that Hydra's override parser reads back as the same value."""

import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, ListConfig

NULL = "null"
"""How Hydra's override syntax spells None."""


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
    if isinstance(plain, str) and not _is_unquoted_word(plain):
        return QuotedString(plain, Quote.single).with_quotes()
    return plain


def _is_unquoted_word(text: str) -> bool:
    """Whether Hydra reads a text without quotes as that text, not as a number, boolean or null."""
    # What Hydra reads as a number, such as 1e3, nan or 1_000, is one for Python too.
    try:
        float(text)
    except ValueError:
        is_keyword = text.lower() in ("true", "false", NULL)
        return bool(re.fullmatch(r"[A-Za-z0-9_./:+@-]+", text)) and not is_keyword
    return False
