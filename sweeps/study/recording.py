"""The outcome of a trial, recorded in its study."""

import logging

import optuna
from optuna.trial import TrialState

from finetune.files.atomic import read_json, write_json
from finetune.files.mirror import Mirror
from finetune.files.run_folder import RunFolder
from finetune.version import SCHEMA_VERSION
from sweeps.space.constraints import violations
from sweeps.space.feasibility import store_violations
from sweeps.study.budget import TRAIN_TOKENS
from sweeps.study.outcome import Outcome
from sweeps.study.session import Session
from sweeps.study.study import TRIALS, Study

log = logging.getLogger(__name__)


def record_outcome(
    session: Session,
    study: Study,
    trial: optuna.Trial,
    folder: RunFolder,
    outcome: Outcome,
) -> None:
    """Store the outcome of a trial, and end its study if its rule says so.

    Args:
        session: the session.
        study: the study.
        trial: the trial, which runs.
        folder: its run folder.
        outcome: how it ended.

    Raises:
        LeaseLost: another worker has taken the trial.
    """
    if study.leases is not None:
        study.leases.require(study.trial_id(trial.number))
    attributes = dict(outcome.attributes)
    result = read_json(folder.result) or {}
    # A trial that failed before it trained has none.
    if TRAIN_TOKENS in result:
        attributes[TRAIN_TOKENS] = result[TRAIN_TOKENS]
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    if outcome.state != TrialState.FAIL:
        # How far the trial is beyond the bounds of `hydra.sweeper.constraints`.
        constraints = session.settings.parsed_constraints
        figures = {**result, **result.get("metrics", {})}
        is_final = outcome.state == TrialState.COMPLETE
        store_violations(trial, violations(constraints, figures, is_final))
    trial.study.tell(
        trial,
        outcome.values,
        outcome.state,
        skip_if_finished=True,
    )
    log.info("trial %d: %s", trial.number, outcome.describe(study.objectives))
    # Its run has copied its folder before.
    Mirror(session.common.mirror).copy(study.folder, without=[TRIALS])
    _end_study_by_rule(session, study)


def write_failed(folder: RunFolder, reason: str) -> None:
    """Write the `result.json` of a failed trial, with what an interrupted run has recorded."""
    result = read_json(folder.result) or {}
    failed = {"status": "failed", "error": reason}
    write_json(folder.result, {"schema_version": SCHEMA_VERSION, **result, **failed})


def _end_study_by_rule(session: Session, study: Study) -> None:
    """End the study if `hydra.sweeper.stop_when` says so, now that a trial has ended."""
    rule = session.end_rule
    if rule is None or study.ended:
        return
    reason = rule(study)
    if reason is not None:
        study.end(reason)
        log.info("study %s: %s", study.name, study.ended)
