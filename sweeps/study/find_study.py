"""Find a study by its folder, by its name under `outputs/sweeps`, or as the newest one."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError
from finetune.files.find_run import LATEST, STUDIES
from sweeps.study.queued_jobs import QUEUED, describe_queued

if TYPE_CHECKING:
    from sweeps.study.study import Study

STUDY_HELP = f"name or folder of the study, or {LATEST}"

_STUDY, _MULTIRUN = "study.json", "multirun.yaml"
"""Files of a study's folder; a plain multirun's has the second one only."""


def study_folders() -> list[Path]:
    """Return the folders of all studies and multiruns under `outputs/sweeps`, the newest last."""
    folders = [folder for folder in STUDIES.glob("*") if _is_study(folder)]
    return sorted(folders, key=begun)


def begun(folder: Path) -> float:
    """Return when the study in a folder began, in Unix time."""
    try:
        return (folder / _STUDY).stat().st_mtime
    except FileNotFoundError:
        return (folder / _MULTIRUN).stat().st_mtime


def find_study(name: str) -> "Study":
    """Load a study, or a plain multirun as one.

    Args:
        name: its folder, its name under `outputs/sweeps`, or `latest`.

    Raises:
        ConfigError: there is no such study.
    """
    return load_study(_find_folder(name))


def find_search(name: str) -> "Study":
    """Load a study as `find_study` does, but refuse a plain multirun, which searched nothing."""
    folder = _find_folder(name)
    if not (folder / _STUDY).is_file():
        reason = "is a plain multirun, which has no sampler: list, show and report work with it"
        raise ConfigError(f"{name}: {reason}")
    return load_study(folder)


def load_study(folder: Path, retry_seconds: float | None = None) -> "Study":
    """Load the study or the plain multirun in a folder. Arguments are those of `Study.load`."""
    # Loads Optuna, which `--help` and a mistake on the command line do not need.
    from sweeps.study.multirun_folder import read_multirun
    from sweeps.study.study import Study

    if (folder / _STUDY).is_file():
        return Study.load(folder.absolute(), retry_seconds)
    return read_multirun(folder.absolute())


def is_plain_multirun(folder: Path) -> bool:
    """Return whether a folder is that of a plain multirun, which searched nothing."""
    return (folder / _MULTIRUN).is_file() and not (folder / _STUDY).is_file()


def _is_study(folder: Path) -> bool:
    return (folder / _STUDY).is_file() or (folder / _MULTIRUN).is_file()


def _find_folder(name: str) -> Path:
    for folder in (Path(name).expanduser(), STUDIES / name):
        if _is_study(folder):
            return folder
        if (folder / QUEUED).is_file():
            raise ConfigError(f"{name}: {describe_queued(folder)}")
    folders = study_folders()
    if name == LATEST and folders:
        return folders[-1]
    names = sorted(folder.name for folder in folders)
    allowed = f"a study's folder (there are no studies under {STUDIES} yet)"
    guess = ""
    if names:
        allowed = f"a study's folder, {LATEST}, or one of {', '.join(names)}"
        nearest = difflib.get_close_matches(name, [*names, LATEST], n=1)
        guess = f"did you mean {nearest[0]}? " if nearest else ""
    raise ConfigError(f"{name}: no such study; {guess}allowed: {allowed}")
