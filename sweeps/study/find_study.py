"""Find a study by its folder, by its name under `outputs/sweeps`, or as the newest one."""

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError
from finetune.files.find_run import LATEST

if TYPE_CHECKING:
    from sweeps.study.study import Study

STUDIES = Path("outputs/sweeps")
"""Folder of all studies, relative to the working directory."""

STUDY_HELP = f"name or folder of the study, or {LATEST}"


def study_folders() -> list[Path]:
    """Return the folders of all studies under `outputs/sweeps`, the newest last."""
    files = sorted(STUDIES.glob("*/study.json"), key=os.path.getmtime)
    return [file.parent for file in files]


def find_study(name: str) -> "Study":
    """Load a study.

    Args:
        name: its folder, its name under `outputs/sweeps`, or `latest`.

    Raises:
        ConfigError: there is no such study.
    """
    # Loads Optuna, which `--help` and a mistake on the command line do not need.
    from sweeps.study.study import Study

    for folder in (Path(name), STUDIES / name):
        if (folder / "study.json").is_file():
            return Study.load(folder.absolute())
    folders = study_folders()
    if name == LATEST and folders:
        return Study.load(folders[-1].absolute())
    raise _no_such_study(name, sorted(folder.name for folder in folders))


def _no_such_study(name: str, names: list[str]) -> ConfigError:
    allowed = f"a study's folder (there are no studies under {STUDIES} yet)"
    guess = ""
    if names:
        allowed = f"a study's folder, {LATEST}, or one of {', '.join(names)}"
        nearest = difflib.get_close_matches(name, [*names, LATEST], n=1)
        guess = f"did you mean {nearest[0]}? " if nearest else ""
    return ConfigError(f"{name}: no such study; {guess}allowed: {allowed}")
