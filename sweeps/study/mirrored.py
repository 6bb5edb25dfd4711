"""A study that goes on after another machine: what that one left in the mirror.

The study's storage says which trials it has. The copy of a trial is fetched only where the study
says that the trial has started, and nothing of it is here, or an older state.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import FrozenTrial, Trial, TrialState

from finetune.errors import ConfigError
from finetune.files.atomic import read_json, write_text
from finetune.files.lock import file_lock
from finetune.files.mirror import Mirror
from finetune.files.mirrored_files import complete_lines
from finetune.files.run_folder import RunFolder
from sweeps.study.storage import JOURNAL
from sweeps.study.study import ANSWER, CONFIRMATION, FINISHED, TRIALS, Study

TAKEN = ".taken"
"""File in a study's folder from when its journal is replaced until its other files are fetched."""

ANSWERS = (ANSWER, CONFIRMATION, "best", "experiment", "report.html")
"""Names in a study's folder that follow from its trials."""


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
        # Before it: a command that is interrupted must leave to the next one what it has to fetch.
        (journal.parent / TAKEN).touch()
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


def fetch_study(mirror: Mirror, study: Study) -> None:
    """Fetch what this machine lacks of a study, whose journal may have been fetched before.

    Raises:
        ConfigError: The mirror can't be read.
    """
    taken = study.folder / TAKEN
    if mirror.has_address:
        # Another command of this machine waits, and then has nothing to fetch.
        with file_lock(study.folder / ".fetch.lock"):
            is_later = taken.exists()
            answers = ANSWERS if is_later else ()
            mirror.fetch(study.folder, without=[TRIALS, JOURNAL], replaced=answers)
            fetch_trials(mirror, study, is_later)
            taken.unlink(missing_ok=True)
    else:
        # The study goes on from what is here.
        taken.unlink(missing_ok=True)


def fetch_trials(mirror: Mirror, study: Study, is_later: bool) -> None:
    """Fetch the trials of which this machine has an older state, or nothing.

    Args:
        mirror: has copies of them.
        study: the study.
        is_later: whether its journal is the mirror's, and running trials have gone on elsewhere.

    Raises:
        ConfigError: The mirror can't be read.
    """
    for trial in study.trials():
        folder = study.folder_of(trial.number)
        is_running = trial.state == TrialState.RUNNING and has_started(trial)
        has_ended_elsewhere = trial.state in FINISHED and not has_ended(folder)
        if has_ended_elsewhere or (is_running and is_later):
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


def has_started(trial: FrozenTrial | Trial) -> bool:
    """Whether a worker has begun to train a trial. Otherwise a copy is of another study's state."""
    return "starts" in trial.user_attrs


def has_ended(folder: RunFolder) -> bool:
    """Whether the run of a trial has ended, and does not go on."""
    result = read_json(folder.result) or {}
    return result.get("status") in ("completed", "pruned", "failed")
