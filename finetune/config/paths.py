"""Where the config folder is, and which names may become folders."""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The config folder: inside the package in an installed wheel, beside it in a checkout."""


PLAIN_NAME = "names a folder: letters, digits, '.', '_' and '-' only"


def is_plain_name(name: str) -> bool:
    """Whether a run's name stays within its parent folder."""
    return bool(re.fullmatch(r"[\w.-]+", name)) and bool(name.strip("."))
