"""Folders that commands create for what they write."""

import os
from pathlib import Path

from finetune.errors import refusal


def new_folder(key: str, folder: str | Path) -> Path:
    """Return the path of a folder that can be created, or is empty.

    Args:
        key: the argument that names the folder, for the error.
        folder: the folder; `~` stands for the user's.

    Raises:
        ConfigError: it holds something, or can't be created. Loading and merging take minutes, so
            this is said before.
    """
    path = Path(folder).expanduser()
    if not path.name:
        raise refusal(key, folder, "must be a new or an empty folder")
    is_file = path.exists() and not path.is_dir()
    if is_file or (path.is_dir() and any(path.iterdir())):
        raise refusal(key, folder, "exists already; must be a new or an empty folder")
    # A draft is written beside it, and renamed.
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise refusal(key, folder, f"can't be created: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise refusal(key, folder, f"can't be created: {parent} can't be written to")
    return path
