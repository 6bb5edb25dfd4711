"""The config folder, and names that may become folders."""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


_CONF_FOLDERS = (PACKAGE / "conf", PACKAGE.parent / "conf")


CONF = next(folder for folder in _CONF_FOLDERS if folder.is_dir())
"""The config folder: in an installed wheel inside the package, in a checkout next to it."""


PLAIN_NAME = "names a folder: letters, digits, '.', '_' and '-' only"
"""What `is_plain_name` accepts, for error messages."""


def is_plain_name(name: str) -> bool:
    """Return whether a name is safe as the name of a folder, and stays within its parent."""
    return bool(re.fullmatch(r"[\w.-]+", name)) and bool(name.strip("."))
