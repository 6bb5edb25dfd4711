"""Start a session's workers, again if one was killed, until no trial is left for them."""

import logging
import time

from finetune.console import error_line
from finetune.errors import Interrupted, refusal
from finetune.quantities import counted
from sweeps.space.settings import StudySettings
from sweeps.study.budget import has_spent_tokens
from sweeps.study.claims import (
    orphaned_trials,
    release_lost_trials,
    trials_elsewhere,
)
from sweeps.study.errors import WorkersLost
from sweeps.study.isolation import train_isolated_trials
from sweeps.study.launchers import launch, raise_worker_error, resume_hint
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.waiting import claimable_waiting_trials
from sweeps.study.worker import Worker
from sweeps.study.worker_place import has_begun, remove_free_places

log = logging.getLogger(__name__)

RELAUNCHES = 25
"""How often to start the workers, as long as one of them is killed each time."""

POLL_SECONDS = 2.0
"""Seconds between two looks at trials that others train."""


def worker_count(settings: StudySettings) -> int:
    """Return the number of workers: `n_jobs`, or as many as have GPUs of their own; one on a CPU.

    Raises:
        ConfigError: no worker can have `gpus_per_worker` of this machine's GPUs.
    """
    from finetune.model.device import gpu_group_count, visible_gpus

    size = settings.gpus_per_worker
    gpus = len(visible_gpus())
    if 0 < gpus < size:
        reason = f"{counted(gpus, 'GPU')} {'is' if gpus == 1 else 'are'} visible here"
        raise refusal("hydra.sweeper.gpus_per_worker", size, reason)
    return settings.n_jobs or gpu_group_count(size)


def run_workers(study: Study, session: Session, waits: bool = True) -> None:
    """Run a session's workers until no trial is left for them.

    Args:
        study: the study.
        session: the session.
        waits: whether to wait for trials that other workers train, in case they are lost.

    Raises:
        Interrupted: the user interrupted the workers.
        WorkersLost: they were killed too often.
        StorageLost: the database is out of reach.
        Exception: what a worker or the launcher raised.
    """
    try:
        _run_workers(study, session, waits)
    finally:
        remove_free_places(session)


def _run_workers(study: Study, session: Session, waits: bool) -> None:
    count = worker_count(session.settings)
    worker = Worker(session)
    losses = 0
    while losses < RELAUNCHES:
        train_isolated_trials(study, session)
        try:
            # A single worker runs in this process.
            returns = launch(study, session, worker, count, in_processes=count > 1)
        except Interrupted:
            raise
        except Exception as error:
            # A worker's error is returned. What is raised is the launcher's own: it could start
            # none, or a process was killed, which each launcher reports in another way.
            if not has_begun(session):
                raise
            log.warning(
                "a worker was lost (%s); its trial is taken on", error_line(error)
            )
            losses += 1
            # Others that live may have taken its trial, and all that wait.
            if _has_waiting(study) or _is_work_left(study, session, waits):
                continue
            return
        raise_worker_error(study, returns)
        # Each has returned how many trials have ended. None: they would not do better again.
        if not any(job.return_value for job in returns):
            losses += 1
        if not _is_work_left(study, session, waits):
            return
    raise WorkersLost(
        f"study {study.name}: workers were lost {RELAUNCHES} times; {resume_hint(study)}"
    )


def _has_waiting(study: Study) -> bool:
    """Whether a trial may begin."""
    return bool(claimable_waiting_trials(study)) and not has_spent_tokens(study)


def _is_work_left(study: Study, session: Session, waits: bool) -> bool:
    """Wait while others train the last trials; return whether there is work for new workers.

    Others may be lost, or give their trials back.

    Raises:
        Interrupted: the user interrupted the wait.
    """
    announced: list[int] = []
    # In a session that is over, trials without a worker wait for the next session.
    while not session.is_over(study):
        release_lost_trials(study)
        if orphaned_trials(study):
            return True
        numbers = [trial.number for trial in trials_elsewhere(study)]
        if not numbers or not waits:
            return False
        if _has_waiting(study):
            return True
        if numbers != announced:
            shown = ", ".join(map(str, numbers))
            log.info("waiting for the workers elsewhere that train %s", shown)
            announced = numbers
        try:
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {resume_hint(study)}") from None
    return False
