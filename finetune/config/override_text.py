"""Text as the value of an override, in quotes where Hydra's parser needs them."""

import re

NULL = "null"
"""How Hydra's override syntax spells None."""


def override_text(text: str) -> str:
    """Return a text as an override's value, which Hydra reads back as that text."""
    if _is_unquoted_word(text):
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted: str = QuotedString(text, Quote.single).with_quotes()
    return quoted


def _is_unquoted_word(text: str) -> bool:
    """Whether Hydra reads a text without quotes as that text, not as a number, boolean or null."""
    # What Hydra reads as a number, such as 1e3, nan or 1_000, is one for Python too.
    try:
        float(text)
    except ValueError:
        is_keyword = text.lower() in ("true", "false", NULL)
        return bool(re.fullmatch(r"[A-Za-z0-9_./:+@-]+", text)) and not is_keyword
    return False
