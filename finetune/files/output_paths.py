"""Files and folders that commands write, refused before the work that comes first.

Loading, merging and evaluating take minutes.
"""

import os
from pathlib import Path

from finetune.errors import refusal


def new_folder(key: str, folder: str | Path) -> Path:
    """Return the path of a folder that can be created, or is empty.

    Args:
        key: the argument that names the folder, for the error.
        folder: the folder; `~` stands for the user's.

    Raises:
        ConfigError: it holds something, or can't be created.
    """
    # A caller from Python may give anything.
    if not isinstance(folder, str | Path) or not Path(folder).name:
        raise refusal(key, folder, "must be a new or an empty folder")
    path = Path(folder).expanduser()
    is_file = path.exists() and not path.is_dir()
    if is_file or (path.is_dir() and any(path.iterdir())):
        raise refusal(key, folder, "exists already; must be a new or an empty folder")
    # A complete folder is renamed to the path: it can replace neither a link nor a mount point.
    if path.is_symlink():
        path = path.resolve()
    if path.is_mount():
        raise refusal(
            key, folder, "is a mount point; must be a new folder, as one in it"
        )
    # A draft is written beside it, and renamed.
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    _require_writable(key, folder, parent)
    return path


def output_file(key: str, file: str | Path) -> Path:
    """Return the path of a file that can be written.

    Args:
        key: the argument that names the file, for the error.
        file: the file; `~` stands for the user's folder.

    Raises:
        ConfigError: it is a folder, or its folder is missing or can't be written to.
    """
    path = Path(file).expanduser()
    if not path.name or path.is_dir():
        raise refusal(key, file, "must be a file")
    parent = path.absolute().parent
    if not parent.exists():
        raise refusal(key, file, f"can't be created: there is no folder {parent}")
    _require_writable(key, file, parent)
    return path


def _require_writable(key: str, given: str | Path, folder: Path) -> None:
    if not folder.is_dir():
        raise refusal(key, given, f"can't be created: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise refusal(key, given, f"can't be created: {folder} can't be written to")
