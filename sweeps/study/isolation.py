"""Trials that have lost two workers without a new checkpoint: each trains alone in a process.

So no other trial is lost with it, and whoever started the process sees whether it was the trial
that ended it: a kill of the whole session ends both.
"""

import logging

from optuna.trial import FrozenTrial

from finetune.console import error_line
from finetune.errors import Interrupted
from finetune.files.atomic import read_json
from finetune.files.mirror import Mirror
from finetune.model.memory import free_memory
from finetune.run.resources import shared_resources
from sweeps.study.adapters import remove_adapters
from sweeps.study.claims import claim_trial, orphaned_trials
from sweeps.study.launchers import launch, raise_worker_error
from sweeps.study.outcome import Outcome
from sweeps.study.recording import record_outcome, write_failed
from sweeps.study.session import Session
from sweeps.study.starts import LOST_WORKERS, needs_isolation, start_step
from sweeps.study.study import Study
from sweeps.study.suggestion import open_trial
from sweeps.study.worker import Worker
from sweeps.study.worker_place import has_begun

log = logging.getLogger(__name__)


def train_isolated_trials(study: Study, session: Session) -> None:
    """Train the trials that need a process of their own, one after the other.

    Args:
        study: the study.
        session: the session.

    Raises:
        Interrupted: the user interrupted a trial; StorageLost: the database is out of reach.
        Exception: what a worker or the launcher raised.
    """
    for trial in filter(needs_isolation, orphaned_trials(study)):
        if session.is_over(study):
            return
        _train_alone(study, session, trial)


def _train_alone(study: Study, session: Session, trial: FrozenTrial) -> None:
    """Train a trial in a process of its own; it has failed if it ends that process too."""
    log.info("trial %d: alone, as it has lost two workers", trial.number)
    # The process needs the memory that a base of this one would hold.
    shared_resources.release()
    free_memory()
    worker = Worker(session, only=trial.number)
    try:
        returns = launch(study, session, worker, count=1, in_processes=True)
    except Interrupted:
        raise
    except Exception as error:
        # The launcher could start no worker.
        if not has_begun(session):
            raise
        log.warning(
            "trial %d: its process was lost (%s)", trial.number, error_line(error)
        )
    else:
        raise_worker_error(study, returns)
    # Else it was lost before its start, or an interruption has excused the losses before this one.
    if _has_more_starts(study, trial):
        _fail_without_progress(study, session, trial.number)


def _has_more_starts(study: Study, before: FrozenTrial) -> bool:
    """Whether a trial has more starts than when it was read."""
    after = study.storage.get_trial(study.trial_id(before.number))
    starts = before.user_attrs.get("starts", [])
    return len(after.user_attrs.get("starts", [])) > len(starts)


def _fail_without_progress(study: Study, session: Session, number: int) -> None:
    """Record a trial without a worker as failed, unless it has a new checkpoint."""
    with claim_trial(study, lambda trial: trial.number == number) as claim:
        # It has ended, or another machine has it.
        if claim is None:
            return
        trial = open_trial(session, study, number, claim.trial_id)
        result = read_json(claim.folder.result) or {}
        was_interrupted = result.get("status") == "interrupted"
        has_progress = start_step(claim.folder) != trial.user_attrs["starts"][-1]
        if was_interrupted or has_progress:
            return
        write_failed(claim.folder, LOST_WORKERS)
        outcome = Outcome.failed(LOST_WORKERS)
        record_outcome(session, study, trial, claim.folder, outcome)
    mirror = Mirror(session.common.mirror)
    remove_adapters(study, session.settings.keep_adapters, mirror)
