"""Names and values as MLflow takes them.

MLflow refuses a whole call, or a whole run, for a single name with `@` or `(`.
"""

import hashlib
import re

NAME_LENGTH = 250
"""Characters of a name that MLflow takes, and that its tables have room for."""

VALUE_LENGTH = 5_000
"""Characters of a param or a tag that MLflow takes, those of its older servers too."""

_OTHER = re.compile(r"[^\w.\- :/]")
"""Characters that names of metrics, params and tags can't have."""

_DIGITS = 8
"""Hexadecimal digits that tell a changed name from others."""


def mlflow_name(name: str) -> str:
    """Return the name of a metric, a param or a tag as MLflow takes it.

    Most names stay as they are. In others, `_` stands for each character that MLflow refuses, and
    the name ends in a part of its SHA-256: `recall@5` and `recall(5)` remain two names.
    """
    shown = _OTHER.sub("_", name)
    # MLflow takes no name that, as a path, would lead elsewhere, nor one that begins with `..`.
    segments = shown.split("/")
    shown = "/".join("_" if part in ("", ".", "..") else part for part in segments)
    if shown.startswith(".."):
        shown = f"_{shown[1:]}"
    return _distinct(shown, name)


def short_name(name: str) -> str:
    """Return the name of an experiment or a run as it is, or cut if it is long."""
    return _distinct(name, name)


def _distinct(shown: str, name: str) -> str:
    """Return a shown name as it is if it is the name; else with an end that the name alone has."""
    if shown == name and len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    end = f"-{digest[:_DIGITS]}"
    return f"{shown[: NAME_LENGTH - len(end)]}{end}"


def mlflow_text(value: object) -> str:
    """Return a value of a param or a tag as MLflow takes it; a long one is cut, and ends in `…`."""
    text = str(value)
    if len(text) <= VALUE_LENGTH:
        return text
    return f"{text[: VALUE_LENGTH - 1]}…"
