"""Find a run by its folder, by its name under `outputs/runs`, or as the newest one."""

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ConfigError, refusal
from finetune.files.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.files.mirror import Mirror

RUNS = Path("outputs/runs")
"""Folder of all runs, relative to the working directory: the beginning of `hydra.run.dir`."""

STUDIES = Path("outputs/sweeps")
"""Folder of all studies, relative to the working directory."""

LATEST = "latest"
"""Stands for the newest run, or the newest study."""

RUN_HELP = (
    "a run folder; its name under outputs/runs (NAME: the newest, NAME/TIME); or latest"
)


def find_run(key: str, name: str) -> Path:
    """Return the folder of a run that has begun.

    Args:
        key: the argument that names the run, for the error.
        name: a run folder, NAME/TIME or NAME (its newest run) under `outputs/runs`, or `latest`.

    Raises:
        ConfigError: there is no such run.
    """
    folder = Path(name).expanduser()
    if RunFolder(folder).identity.exists():
        return folder
    runs = _runs()
    # The path from the working directory too, because a shell completes that one.
    paths = (folder.absolute(), (RUNS / name).absolute())
    matching = []
    for run in runs:
        is_latest = name == LATEST
        if is_latest or run.absolute() in paths or run.parent.absolute() in paths:
            matching.append(run)
    if not matching:
        raise _no_such_run(key, name, runs)
    return matching[-1]


def fetch_run(mirror: "Mirror", name: str) -> Path:
    """Return the folder of a run; of NAME the newest one, here or fetched from a mirror.

    Args:
        mirror: Has copies of run folders.
        name: A run folder, NAME/TIME or NAME under `outputs/runs`.

    Raises:
        ConfigError: There is no such run, here or in the mirror.
    """
    mirror.check()
    copied = _newest_copy(mirror, name)
    try:
        run = find_run("resume", name)
    except ConfigError:
        if copied is None:
            raise
    else:
        # A run's folder is named by the time when it began.
        if copied is None or run.name >= copied.name:
            return run
    # What is here stays: it may be newer than its copy.
    if not RunFolder(copied).identity.exists():
        mirror.fetch_run(RunFolder(copied))
    return copied


def _newest_copy(mirror: "Mirror", name: str) -> Path | None:
    """Return the newest run in a mirror of those that `find_run` would take here."""
    for folder in (Path(name).expanduser(), RUNS / name):
        copied = mirror.newest_run(folder)
        # Those in the folders of studies have other names.
        if copied and (
            copied == folder or copied.parent.parent.absolute() == RUNS.absolute()
        ):
            return copied
    return None


def _runs() -> list[Path]:
    """Return the folders of all runs under `outputs/runs`, the newest last."""
    begun = {}
    for identity in RUNS.glob("*/*/run.json"):
        # A run that another process removes meanwhile is left out.
        with contextlib.suppress(FileNotFoundError):
            # Written when a run begins or resumes.
            begun[identity.parent] = identity.stat().st_mtime_ns
    return sorted(begun, key=begun.__getitem__)


def _no_such_run(key: str, name: str, runs: list[Path]) -> ConfigError:
    names = sorted({run.parent.name for run in runs})
    addresses = [run.relative_to(RUNS).as_posix() for run in runs]
    nearest = difflib.get_close_matches(name, [*names, LATEST, *addresses], n=1)
    guess = f"did you mean {nearest[0]}? " if nearest and runs else ""
    folder = Path(name).expanduser()
    for winner in (folder / "best", STUDIES / name / "best"):
        if RunFolder(winner).identity.exists():
            return refusal(key, name, f"is a study; the run of its winner is {winner}")
    problem = "it has no run.json" if folder.is_dir() else "no such run"
    allowed = "the folder of a run that has begun, as outputs/runs/NAME/TIME"
    if runs:
        allowed = f"{allowed}, {LATEST}, {', '.join(names)}"
    return refusal(key, name, f"{problem}; {guess}allowed: {allowed}")
