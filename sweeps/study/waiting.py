"""The trials of a study that wait for a worker, and the points that they have.

All trials of a study are added when it begins, waiting; those that a user adds by hand come on top,
see `sweeps.study.added_points`.
"""

import logging

from optuna.trial import FrozenTrial, TrialState

from finetune.files.lock import file_lock
from finetune.quantities import counted
from sweeps.compat import enqueue_point, enqueued_point
from sweeps.space.space import Point
from sweeps.study.roles import ADDED, role
from sweeps.study.study import OUT_OF_TIME, Study
from sweeps.study.untried import is_among, tried_points

log = logging.getLogger(__name__)


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
            total = len(planned_trials(study)) + _lacking_trials(study, untried)
        add_waiting_trials(study, total)
        _enqueue_points(study, untried, total)


def _lacking_trials(study: Study, untried: list[tuple[str, Point]]) -> int:
    """Return how many waiting trials the points need in addition to those there are."""
    return max(0, len(untried) - len(_free_trials(study)))


def _free_trials(study: Study) -> list[FrozenTrial]:
    """Return the waiting trials without a point."""
    waiting = study.trials(TrialState.WAITING)
    return [trial for trial in waiting if enqueued_point(trial) is None]


def add_waiting_trials(study: Study, total: int) -> None:
    """Add waiting trials until the study has a number of them, besides those added by hand."""
    while True:
        # Read once: another machine may add the same trials between two readings.
        trials = study.trials()
        lacking = total - len(_planned(trials))
        if lacking <= 0:
            return
        # All at once: workers that count the trials and then ask for one end up with too many.
        first = len(trials)
        # Another machine may add the same trials now: a database refuses numbers that it holds,
        # and the trials are counted again.
        study.add_waiting_trials(range(first, first + lacking))


def planned_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials without those that a user has added by hand, by number."""
    return _planned(study.trials())


def _planned(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if role(trial) != ADDED]


def claimable_waiting_trials(study: Study) -> list[FrozenTrial]:
    """Return the waiting trials that may begin: those added by hand first, then the planned ones.

    Of a study that has ended itself, only those added by hand.
    """
    added = [
        trial for trial in study.trials(TrialState.WAITING) if role(trial) == ADDED
    ]
    if study.ended:
        return added
    # An earlier session may have planned more trials than the study shall hold now.
    planned = planned_trials(study)[: study.planned_total]
    waiting = [trial for trial in planned if trial.state == TrialState.WAITING]
    return [*added, *waiting]


def _enqueue_points(study: Study, untried: list[tuple[str, Point]], total: int) -> None:
    """Give the points not yet tried to waiting trials without one, in order."""
    free = _free_trials(study)
    # Not strict: the sampler chooses for the trials that remain, and further points wait.
    for trial, (point_role, point) in zip(free, untried, strict=False):
        trial_id = study.trial_id(trial.number)
        enqueue_point(study.storage, trial_id, point)
        study.storage.set_trial_user_attr(trial_id, "role", point_role)
    if free and untried:
        study.announce_points()
    excess = len(untried) - len(free)
    if excess > 0:
        verb, them = ("waits", "it") if excess == 1 else ("wait", "them")
        log.info(
            "%s %s for a trial: hydra.sweeper.n_trials=%d takes %s",
            counted(excess, "point"),
            verb,
            total + excess,
            them,
        )


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
