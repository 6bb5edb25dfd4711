"""Which worker trains which trial.

All trials of a study are added when it begins, waiting, and a worker claims one at a time. Where a
budget instead of a number ends the study, each claim adds the trial that it needs. A claim
holds the lock of the trial's folder as long as the worker's process lives. A running trial whose
folder is not locked has lost its worker; the next claim adopts it under its own number.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.files.lock import file_lock
from finetune.files.run_folder import FolderHeld, RunFolder
from sweeps.compat import enqueue_point, enqueued_point
from sweeps.space.space import Point
from sweeps.study.study import OUT_OF_TIME, Study, role
from sweeps.study.untried import is_among, tried_points

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A trial that this worker trains, and its locked folder."""

    number: int
    trial_id: int
    """The storage's id of the trial."""
    folder: RunFolder


def enqueue_trials(
    study: Study,
    total: int | None,
    points: list[tuple[str, Point]],
    max_tokens: int | None = None,
) -> None:
    """Add waiting trials until the study has its total, and give them the points not yet tried.

    Args:
        study: the study.
        total: number of trials that the study shall hold when it is done; None: as many as the
            budget allows.
        points: role (baseline, start, grid) and point, for the next waiting trials. The baseline
            is tried once, and again if it ran out of time.
        max_tokens: training tokens of all trials, from which on none begins; None: no limit.
    """
    # Two sessions at once must not both add the trials that the study lacks.
    with file_lock(study.lock_path):
        study.optuna.set_user_attr("total", total)
        study.optuna.set_user_attr("max_tokens", max_tokens)
        untried = _untried_points(study, points)
        if total is None:
            total = len(study.trials()) + _lacking_trials(study, untried)
        _add_waiting_trials(study, total)
        _enqueue_points(study, untried, total)


def _lacking_trials(study: Study, untried: list[tuple[str, Point]]) -> int:
    """Return how many waiting trials the points need in addition to those there are."""
    return max(0, len(untried) - len(_free_trials(study)))


def _free_trials(study: Study) -> list[FrozenTrial]:
    """Return the waiting trials without a point."""
    waiting = study.trials(TrialState.WAITING)
    return [trial for trial in waiting if enqueued_point(trial) is None]


def _add_waiting_trials(study: Study, total: int) -> None:
    # All at once: workers that count the trials and then ask for one end up with too many.
    for number in range(len(study.trials()), total):
        trial = create_trial(state=TrialState.WAITING)
        # Another machine may add the same trial now: a database refuses a number that it holds.
        trial.number = number
        study.optuna.add_trial(trial)


def _enqueue_points(study: Study, untried: list[tuple[str, Point]], total: int) -> None:
    """Give the points not yet tried to waiting trials without one, in order."""
    free = _free_trials(study)
    # Not strict: the sampler chooses for the trials that remain, and further points wait.
    for trial, (point_role, point) in zip(free, untried, strict=False):
        trial_id = study.trial_id(trial.number)
        enqueue_point(study.storage, trial_id, point)
        study.storage.set_trial_user_attr(trial_id, "role", point_role)
    excess = len(untried) - len(free)
    if excess > 0:
        message = "%d points wait for a trial: hydra.sweeper.n_trials=%d takes them"
        log.info(message, excess, total + excess)


def _untried_points(
    study: Study, points: list[tuple[str, Point]]
) -> list[tuple[str, Point]]:
    """Return the points that no trial has, each once."""
    trials = study.trials()
    tried = tried_points(trials)
    has_baseline = any(
        role(trial) == "baseline" and trial.user_attrs.get("reason") != OUT_OF_TIME
        for trial in trials
    )
    untried: list[tuple[str, Point]] = []
    for point_role, point in points:
        # A resumed study's config may have other own values; its first baseline stays the one.
        is_second_baseline = point_role == "baseline" and has_baseline
        if is_among(point, tried) or is_second_baseline:
            continue
        untried.append((point_role, point))
        tried.append(point)
    return untried


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
        _add_waiting_trials(study, len(study.trials()) + 1)


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
            return Claim(trial.number, trial_id, folder)
        # Another machine was first.
        folder_lock.close()
        _remove_unused_folder(folder)
    return None


def _claimable_trials(study: Study) -> list[FrozenTrial]:
    """Return the running trials whose folders are on this machine, then those that wait.

    Of a study that has ended itself, none that waits.
    """
    adoptable = []
    for trial in study.trials(TrialState.RUNNING):
        # A running trial without a folder here belongs to another machine.
        folder = study.folder_of(trial.number)
        if not study.is_shared or folder.path.exists():
            adoptable.append(trial)
    if study.ended:
        return adoptable
    # An earlier session may have added more trials than the study shall hold now.
    total = study.total
    waiting = study.trials(TrialState.WAITING)
    if total is not None:
        waiting = [trial for trial in waiting if trial.number < total]
    return [*adoptable, *waiting]


def _set_running(study: Study, trial: FrozenTrial, trial_id: int) -> bool:
    """Set a waiting trial running; return whether the trial is this worker's now."""
    if trial.state == TrialState.RUNNING:
        # Asked again, because it may have finished since it was read.
        return study.storage.get_trial(trial_id).state == TrialState.RUNNING
    try:
        return study.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        # Another machine has claimed and finished it meanwhile.
        return False


def _remove_unused_folder(folder: RunFolder) -> None:
    """Remove the folder of a trial that another machine claimed first.

    Its folder would make the trial look like one of this machine's.
    """
    if {entry.name for entry in folder.path.iterdir()} == {".lock"}:
        (folder.path / ".lock").unlink()
        folder.path.rmdir()


def orphaned_trials(study: Study) -> list[int]:
    """Return the numbers of this machine's running trials that have lost their worker."""
    numbers = []
    with file_lock(study.lock_path):
        for trial in study.trials(TrialState.RUNNING):
            folder = study.folder_of(trial.number)
            if not folder.path.exists():
                continue
            # A lock that can be taken shows that no worker holds it.
            with contextlib.suppress(FolderHeld), folder.locked():
                numbers.append(trial.number)
    return numbers
