"""Which worker trains which trial.

The trials wait, see `sweeps.study.waiting`, and a worker claims one at a time. Where a budget
instead of a number ends the study, each claim adds the trial that it needs. A claim
holds the lock of the trial's folder as long as the worker's process lives. A running trial whose
folder is not locked has lost its worker; the next claim adopts it under its own number. Trials of
other machines have leases, see `sweeps.study.leases`.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.files.lock import file_lock
from finetune.files.run_folder import FolderHeld, RunFolder
from sweeps.study.study import Study
from sweeps.study.waiting import (
    add_waiting_trials,
    claimable_waiting_trials,
    planned_trials,
)


@dataclass(frozen=True)
class Claim:
    """A trial that this worker trains, and its locked folder."""

    number: int
    trial_id: int
    """The storage's id of the trial."""
    folder: RunFolder


@contextlib.contextmanager
def claim_trial(
    study: Study, accepts: Callable[[FrozenTrial], bool] = lambda _: True
) -> Iterator[Claim | None]:
    """Claim the next trial: a running one without a worker, else the next that waits.

    Args:
        study: the study.
        accepts: which trials to consider.

    Yields:
        The claim, or None if there is no such trial. The trial's folder is locked until the
        context ends.
    """
    # The folder stays locked after the study's lock is free, until the trial ends.
    with contextlib.ExitStack() as folder_lock:
        # One claim at a time, and none while `orphaned_trials` takes folder locks to test them.
        with file_lock(study.lock_path):
            claim = _claim_next(study, accepts, folder_lock)
        yield claim


def _claim_next(
    study: Study,
    accepts: Callable[[FrozenTrial], bool],
    folder_lock: contextlib.ExitStack,
) -> Claim | None:
    # Another machine may be first with each of them.
    while True:
        claim = _claim_existing(study, accepts, folder_lock)
        if claim is not None or study.total is not None or study.ended:
            return claim
        if not accepts(create_trial(state=TrialState.WAITING)):
            return None
        add_waiting_trials(study, len(planned_trials(study)) + 1)


def _claim_existing(
    study: Study,
    accepts: Callable[[FrozenTrial], bool],
    folder_lock: contextlib.ExitStack,
) -> Claim | None:
    for trial in filter(accepts, _claimable_trials(study)):
        folder = study.folder_of(trial.number)
        # Locked before it is set running: a running trial with a free folder has lost its worker.
        try:
            folder_lock.enter_context(folder.locked())
        except FolderHeld:
            # Another worker of this machine trains it.
            continue
        trial_id = study.trial_id(trial.number)
        if _set_running(study, trial, trial_id):
            folder_lock.callback(_release, study, trial_id)
            return Claim(trial.number, trial_id, folder)
        # Another machine was first.
        folder_lock.close()
        _remove_unused_folder(folder)
    return None


def _claimable_trials(study: Study) -> list[FrozenTrial]:
    """Return the running trials that this machine may adopt, then those that wait."""
    return [*adoptable_trials(study), *claimable_waiting_trials(study)]


def adoptable_trials(study: Study) -> list[FrozenTrial]:
    """Return the running trials that a worker of this machine may adopt if their folders are free.

    Without leases, a running trial of a database whose folder is not here belongs to another
    machine.
    """
    running = study.trials(TrialState.RUNNING)
    if study.leases is not None:
        trials = _by_id(study, running)
        return [trials[trial_id] for trial_id in study.leases.free(trials)]
    if not study.is_shared:
        return running
    return [trial for trial in running if study.folder_of(trial.number).path.exists()]


def _by_id(study: Study, trials: list[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return trials by the storage's ids."""
    return {study.trial_id(trial.number): trial for trial in trials}


def _set_running(study: Study, trial: FrozenTrial, trial_id: int) -> bool:
    """Set a waiting trial running; return whether the trial is this worker's now."""
    leases = study.leases
    if trial.state == TrialState.RUNNING:
        if leases is not None:
            return leases.take(trial_id, trial)
        # Asked again, because it may have finished since it was read.
        return study.storage.get_trial(trial_id).state == TrialState.RUNNING
    try:
        if leases is not None:
            return leases.claim(trial_id)
        return study.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        # Another machine has claimed and finished it meanwhile.
        return False


def _release(study: Study, trial_id: int) -> None:
    """Give a trial back that still runs when its claim ends, as after Ctrl-C."""
    if study.leases is not None:
        study.leases.release(trial_id)


def _remove_unused_folder(folder: RunFolder) -> None:
    """Remove the folder of a trial that another machine claimed first.

    Its folder would make the trial look like one of this machine's.
    """
    if {entry.name for entry in folder.path.iterdir()} == {".lock"}:
        (folder.path / ".lock").unlink()
        folder.path.rmdir()


def release_lost_trials(study: Study) -> None:
    """Let any worker take the trials of lost machines, where trials have leases."""
    if study.leases is not None:
        running = study.trials(TrialState.RUNNING)
        study.leases.release_lost(_by_id(study, running))


def orphaned_trials(study: Study) -> list[FrozenTrial]:
    """Return the running trials that have lost their workers, and that this machine may adopt."""
    orphaned = []
    with file_lock(study.lock_path):
        for trial in adoptable_trials(study):
            folder = study.folder_of(trial.number)
            # Another machine's, which this one would begin anew.
            if not folder.path.exists():
                orphaned.append(trial)
                continue
            # A lock that can be taken shows that no worker holds it.
            with contextlib.suppress(FolderHeld), folder.locked():
                orphaned.append(trial)
    return orphaned


def trials_elsewhere(study: Study) -> list[FrozenTrial]:
    """Return the running trials that other workers train, in folders here or by leases."""
    orphaned = {trial.number for trial in orphaned_trials(study)}
    elsewhere = []
    for trial in study.trials(TrialState.RUNNING):
        is_here = study.folder_of(trial.number).path.exists()
        is_leased = study.leases is not None and study.leases.covers(trial)
        if trial.number not in orphaned and (is_here or is_leased):
            elsewhere.append(trial)
    return elsewhere
