"""The point of a trial: its fixed values, and those that the sampler chooses."""

import optuna
from optuna.samplers import BaseSampler

from finetune.files.lock import file_lock
from sweeps.compat import enqueued_point, filtered_study
from sweeps.space.custom import load_function
from sweeps.space.points import may_repeat
from sweeps.space.samplers import reads_bounded_trials
from sweeps.space.space import Point
from sweeps.study.earlier_results import WarmStartSampler
from sweeps.study.inside import OUTSIDE, is_inside, point_of
from sweeps.study.recent_trials import RecentTrialsSampler
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.untried import UntriedPointSampler
from sweeps.study.warm_start import earlier_trials


def open_trial(
    session: Session, study: Study, number: int, trial_id: int
) -> optuna.Trial:
    """Return a running trial with its sampler and its pruner, which see what the space holds.

    Args:
        session: the session.
        study: the study.
        number: the trial's number.
        trial_id: the storage's id of the trial.
    """
    searched = filtered_study(
        study.name,
        study.storage,
        _sampler(session, study, number),
        session.pruner,
        is_inside,
    )
    # Not by `ask`, which would begin another trial: an adopted one keeps its number.
    return optuna.Trial(searched, trial_id)


def suggest_point(session: Session, study: Study, trial: optuna.Trial) -> Point:
    """Let the sampler choose what is not fixed; return all values of the trial."""
    space = session.space
    stored = study.storage.get_trial(study.trial_id(trial.number))
    enqueued = enqueued_point(stored) or {}
    outside = space.outside(enqueued)
    if outside:
        trial.set_user_attr(OUTSIDE, outside)
    # One trial at a time, so that no two draw the same untried point.
    with file_lock(study.lock_path):
        space.suggest(trial, outside)
    function_path = session.settings.custom_search_space
    if function_path:
        extend = load_function(function_path)
        extend(session.config, trial)
    return point_of(trial)


def _sampler(session: Session, study: Study, number: int) -> BaseSampler:
    """Return a trial's sampler: it has seen earlier studies, and repeats no point if it can."""
    sampler = session.sampler(number)
    if reads_bounded_trials(session.settings):
        sampler = RecentTrialsSampler(sampler)
    earlier = earlier_trials(study, session.space)
    if earlier:
        sampler = WarmStartSampler(sampler, earlier)
    # What a user's function suggests besides makes other trials of the same point.
    if not may_repeat(session.space) or session.settings.custom_search_space:
        return sampler
    return UntriedPointSampler(sampler, session.space, seed=number)
