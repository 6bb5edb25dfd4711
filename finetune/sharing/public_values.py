"""What of a config may be published: numbers and words, never prompts, rows or local paths."""

import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from finetune.config.data_folder import file_type, is_remote, local_path

WORD = re.compile(r"[\w.,:|^$*()+-]{1,64}")
"""A value that is no sentence and no path."""

HIDDEN = "(not shown)"
"""Stands in a card for a value that may hold text or a path."""

PATH_KEYS = (
    "dataset.path",
    "dataset.eval_path",
    "dataset.test_path",
    "model.name_or_path",
    "lora.adapter",
)
"""Config keys whose values name files, or repositories on the hub."""


def public_value(value: Any) -> str:
    """Return a config value as a card may show it: a number, a word, or a list of these."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(public_value, value))
    if isinstance(value, str) and WORD.fullmatch(value):
        return value
    return HIDDEN


def public_parameter(key: str, value: Any) -> str:
    """Return a searched value as a card may show it; of a path its last part."""
    if key in PATH_KEYS and isinstance(value, str):
        return value if is_hub_id(value) else file_name(value)
    return public_value(value)


def is_hub_id(path: str) -> bool:
    """Return whether a path of a recorded config names a repository on the hub.

    In `run.json`, files and folders that existed have absolute paths.
    """
    if is_remote(path) or any(file_type(path)):
        return False
    is_local = path.startswith((".", "/", "~", "file://"))
    return not is_local and path.count("/") == 1


def file_name(path: str) -> str:
    """Return the name of a file or a folder, without its path, host, user or query."""
    if is_remote(path):
        return PurePosixPath(urlsplit(path).path).name
    return local_path(path).name
