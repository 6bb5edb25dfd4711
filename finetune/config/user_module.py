"""Modules of the user's, which config keys name by import paths."""

import importlib
import os
import sys
from types import ModuleType


def import_user_module(name: str) -> ModuleType:
    """Import a module, with the working directory among the folders of modules.

    Raises:
        Exception: Whatever the import raises; what a user's module raises is not known.
    """
    add_working_directory()
    return importlib.import_module(name)


def add_working_directory() -> None:
    """Add the working directory to the folders of modules.

    The script `finetune`, unlike `python -m finetune`, does not look there.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
