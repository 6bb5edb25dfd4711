"""A study that goes on after another machine: what that one left in the mirror.

The study's storage says which trials it has. The copy of a trial is fetched only where the study
says that the trial has started and nothing of it is here.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import ConfigError
from finetune.files.atomic import read_json, write_text
from finetune.files.lock import file_lock
from finetune.files.mirror import Mirror
from finetune.files.mirrored_files import complete_lines
from finetune.files.run_folder import RunFolder
from sweeps.study.storage import JOURNAL
from sweeps.study.study import TRIALS, Study


def fetch_study(mirror: Mirror, folder: Path) -> None:
    """Fetch a study without its trials; its journal too where the mirror has a later state.

    Raises:
        ConfigError: The mirror can't be read, or its study and the one here have gone on apart.
    """
    fetch_journal(mirror, folder / JOURNAL)
    mirror.fetch(folder, without=[TRIALS, JOURNAL])


def fetch_journal(mirror: Mirror, journal: Path) -> None:
    """Take the mirror's journal if it continues the one here.

    Raises:
        ConfigError: Neither continues the other, or the mirror can't be read.
    """
    # Before the one here is read, which another command may continue and copy.
    copied = complete_lines(mirror.read(journal))
    if not copied:
        return
    journal.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(journal.with_suffix(".lock")):
        content = complete_lines(journal.read_bytes()) if journal.exists() else b""
        if content.startswith(copied):
            return
        if not copied.startswith(content):
            raise ConfigError(
                f"mirror: its copy of {journal} and the file here have gone on apart, on two "
                f"machines; remove {journal.parent} to go on with the mirror's study, or give "
                "another hydra.sweeper.study_name"
            )
        write_text(journal, copied.decode(), single_writer=True)


def fetch_trial(mirror: Mirror, folder: RunFolder) -> None:
    """Fetch a trial that is not here.

    Raises:
        ConfigError: The mirror can't be read.
    """
    # `RunFolder.clear` leaves the log: what was removed here does not come back.
    is_here = folder.identity.exists() or (folder.path / "train.log").exists()
    if not is_here:
        mirror.fetch_run(folder)


def fetch_finished_trials(mirror: Mirror, study: Study) -> None:
    """Fetch the finished trials that have not ended in this machine's folder.

    Raises:
        ConfigError: The mirror can't be read.
    """
    for trial in study.finished():
        folder = study.folder_of(trial.number)
        if not has_ended(folder):
            mirror.fetch_run(folder)


@contextlib.contextmanager
def copied_at_end(mirror: Mirror, study: Study) -> Iterator[None]:
    """Copy the study's journal when the block has ended, however it ends.

    A machine whose journal has been copied to its end can take the study back from another one.
    """
    try:
        yield
    finally:
        mirror.copy(study.folder, without=[TRIALS])
        Mirror.finish()


def has_ended(folder: RunFolder) -> bool:
    """Whether the run of a trial has ended, and does not go on."""
    result = read_json(folder.result) or {}
    return result.get("status") in ("completed", "pruned", "failed")
