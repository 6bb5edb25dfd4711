"""Begin a study, or resume it, on the terms that its trials share."""

import json
import logging
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from finetune.errors import refusal
from finetune.files.atomic import write_json
from finetune.files.lock import file_lock
from finetune.files.mirror import NO_MIRROR, Mirror
from finetune.files.run_folder import FolderHeld, RunFolder
from sweeps.compat import enqueue_point
from sweeps.space.settings import StudySettings
from sweeps.study.claims import adoptable_trials
from sweeps.study.mirrored import fetch_trial, has_ended
from sweeps.study.roles import role
from sweeps.study.storage import hold_database_file, open_storage
from sweeps.study.study import TRIALS, Study
from sweeps.study.terms import (
    has_new_config,
    require_changeable,
    require_same_terms,
    unsearched_values,
)

log = logging.getLogger(__name__)


def create_or_resume(
    folder: Path,
    settings: StudySettings,
    address: str | None,
    terms: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    automatic_keys: Sequence[str] = (),
    mirror: Mirror = NO_MIRROR,
) -> Study:
    """Begin a study, or resume it.

    Args:
        folder: the study's folder; made if missing.
        settings: the study's settings.
        address: the database's address; None: a journal in the folder.
        terms: what makes trials comparable, see `sweeps.study.terms`.
        distributions: the searched parameters.
        automatic_keys: terms that the config leaves to the study, which keeps those it began with.
        mirror: may have trials that are not here.

    Returns:
        The study.

    Raises:
        ConfigError: the study began on other terms, or its storage can't be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Two commands with the same new name must not both give it a uid and terms.
    with file_lock(folder / ".lock"):
        hold = hold_database_file(address)
        optuna.create_study(
            study_name=settings.study_name,
            storage=open_storage(address, folder),
            directions=settings.directions,
            load_if_exists=True,
        )
        study = Study(
            folder,
            settings.study_name,
            address,
            lost_after=settings.lost_after,
        )
        study.hold = hold
        _ensure_uid(study, mirror)
        stored = study.optuna.user_attrs.get("terms", {})
        initial = {key: stored[key] for key in automatic_keys if key in stored}
        terms = {**terms, **initial}
        _update_terms(study, terms, distributions, settings.allow_change, mirror)
        _name_metrics(study)
        study.optuna.set_user_attr("sampler", settings.sampler)
        if settings.stop_when is None:
            _resume_ended(study)
        # Last, because a folder with this file counts as a study, whose terms can be read.
        # The address is as the user wrote it: secrets stay references to environment variables.
        entry = {"name": settings.study_name, "storage": settings.storage}
        write_json(folder / "study.json", entry)
    return study


def _ensure_uid(study: Study, mirror: Mirror) -> None:
    """Give a new study its uid; refuse the folder of another study, also one in the mirror."""
    if "uid" in study.optuna.user_attrs:
        return
    trials = study.folder / TRIALS
    is_here = trials.exists()
    if is_here or mirror.newest_run(trials) is not None:
        folder = study.folder if is_here else f"the mirror's copy of {study.folder}"
        reason = (
            f"another study's trials are in {folder}, and this storage has no such study; "
            "give another name"
        )
        raise refusal("hydra.sweeper.study_name", study.name, reason)
    study.optuna.set_user_attr("uid", uuid.uuid4().hex[:8])


def _update_terms(
    study: Study,
    terms: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution],
    allow_change: bool,
    mirror: Mirror,
) -> None:
    """Compare the terms with those the study began with, and store those that hold now."""
    stored = study.optuna.user_attrs.get("terms")
    if stored is not None:
        if not allow_change:
            # Stored terms have gone through JSON, which makes lists of tuples.
            plain_terms = json.loads(json.dumps(terms))
            require_same_terms(study.name, stored, plain_terms)
        require_changeable(
            study.name,
            stored,
            terms,
            study.trials(),
            distributions,
        )
        _drop_unsearched_points(study, stored, terms)
        if has_new_config(stored, terms):
            _clear_unfinished_runs(study, mirror)
        if stored != json.loads(json.dumps(terms)):
            # The study ended itself for what it searched before the change.
            _resume_ended(study)
    if stored != terms:
        study.optuna.set_user_attr("terms", terms)


def _drop_unsearched_points(
    study: Study, stored: Mapping[str, Any], terms: Mapping[str, Any]
) -> None:
    """Take their points from planned trials that would train without a value of them.

    This command's own points are enqueued afterwards.
    """
    for trial in study.trials(TrialState.WAITING):
        unsearched = unsearched_values(stored, terms, trial)
        if not unsearched:
            continue
        trial_id = study.trial_id(trial.number)
        enqueue_point(study.storage, trial_id, {})
        study.storage.set_trial_user_attr(trial_id, "role", "")
        log.info(
            "trial %d: its point is dropped (%s), as it has %s, which is not searched any more",
            trial.number,
            role(trial),
            ", ".join(unsearched),
        )
        study.announce_points()


def _resume_ended(study: Study) -> None:
    """Let a study that has ended itself go on."""
    if study.ended:
        study.optuna.set_user_attr("ended", None)


def _name_metrics(study: Study) -> None:
    """Store the names of the objectives for Optuna's own tools, as optuna-dashboard.

    A study from before this was done gets them when it is resumed.
    """
    if study.optuna.metric_names == study.objectives:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.optuna.set_metric_names(study.objectives)


def _clear_unfinished_runs(study: Study, mirror: Mirror) -> None:
    """Empty the folders of running trials without a worker: their config is another now."""
    adoptable = {trial.number for trial in adoptable_trials(study)}
    for trial in study.trials(TrialState.RUNNING):
        folder = study.folder_of(trial.number)
        # One that another machine trains has a copy too.
        is_adoptable = trial.number in adoptable
        if folder.path.exists() or (is_adoptable and mirror.newest_run(folder.path)):
            _clear_unfinished_run(folder, mirror)


def _clear_unfinished_run(folder: RunFolder, mirror: Mirror) -> None:
    """Empty a run's folder and its copy, unless a worker trains the run or it has ended."""
    try:
        with folder.locked():
            fetch_trial(mirror, folder)
            # A run that has ended counts, though its worker was lost before the study stored it.
            if not has_ended(folder):
                folder.clear()
                mirror.copy_run(folder.path)
    except FolderHeld:
        return
