"""Earlier studies as a start for a new one: `hydra.sweeper.warm_start`.

A trial of an earlier study is a result if a trial of this study could have all its values: those
that either study searches, and those of their configs. The sampler treats results as trials that
it has seen. The best point is trained again; of a study without results, the best few. Results do
not count as this study's trials, so the winner is always a trial that this study has trained.

What is taken stands in the study's storage, by the earlier study's name: a resumed study takes
nothing twice, and workers on all machines read the same results.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.errors import ConfigError, refusal
from finetune.files.atomic import read_json
from finetune.quantities import counted
from sweeps.space.constraints import Constraint, violations
from sweeps.space.samplers import learns_from_results
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.find_study import find_search
from sweeps.study.matching import Matching, Unmatched
from sweeps.study.result_values import (
    ConfigValues,
    Values,
    searched_keys,
    study_values,
    trial_values,
)
from sweeps.study.study import Study
from sweeps.study.terms import stored_space

log = logging.getLogger(__name__)

KEY = "hydra.sweeper.warm_start"

EARLIER = "earlier"
"""The study's attribute with what was taken of each earlier study: results, points and a note."""

BEST_POINTS = 3
"""How many of the best points of a study without usable results are trained again."""


@dataclass(frozen=True)
class _Taken:
    """What one earlier study gives."""

    results: list[dict[str, Any]]
    points: list[Point]
    note: str
    """How much it is, and what is left out, in one line."""


def require_studies(settings: StudySettings, folder: Path) -> None:
    """Refuse earlier studies that do not exist, before a new study begins.

    Args:
        settings: the study's settings.
        folder: the study's folder. One that exists may have taken them already.

    Raises:
        ConfigError: there is no such study, or it is this one.
    """
    if (folder / "study.json").exists():
        return
    for name in settings.warm_start:
        _load(name, folder)


def take_earlier_studies(
    study: Study,
    settings: StudySettings,
    space: Space,
    read_config: Callable[[], ConfigValues],
) -> list[tuple[str, Point]]:
    """Take the results and points of the earlier studies that are not taken yet.

    Args:
        study: the study, with its terms stored.
        settings: the study's settings.
        space: the searched parameters.
        read_config: reads the values of the study's config; called where they are needed.

    Returns:
        Role and point of the trials that shall train points of earlier studies.

    Raises:
        ConfigError: there is no such study, or it is this one.
    """
    taken: dict[str, Any] = study.optuna.user_attrs.get(EARLIER, {})
    missing = [name for name in settings.warm_start if name not in taken]
    if missing:
        shared = study_values(study.optuna.user_attrs["terms"])
        matching = Matching(space, shared, read_config())
        for name in missing:
            given = _take(_load(name, study.folder), matching, settings)
            taken[name] = asdict(given)
            study.optuna.set_user_attr(EARLIER, taken)
            log.info("warm start: %s: %s", name, given.note)
    points = []
    for given_by_name in taken.values():
        points += [("warm_start", point) for point in given_by_name["points"]]
    return points


def warm_start_notes(study: Study) -> list[str]:
    """Return a line for each earlier study: how many results and points were taken."""
    notes = []
    for name, taken in study.optuna.user_attrs.get(EARLIER, {}).items():
        # Studies from before it was stored have no note.
        counts = _describe_counts(len(taken["results"]), len(taken["points"]))
        notes.append(f"{name}: {taken.get('note', counts)}")
    return notes


def earlier_trials(study: Study, space: Space) -> list[FrozenTrial]:
    """Return the results of earlier studies that lie in a space, as trials for its sampler."""
    trials = []
    for taken in study.optuna.user_attrs.get(EARLIER, {}).values():
        for result in taken["results"]:
            if _is_whole(result["params"], space):
                trials.append(_as_trial(result, space))
    return trials


def _is_whole(point: Point, space: Space) -> bool:
    """Whether a point has a value inside the space for exactly what is searched there."""
    searched = {name for name in space.distributions if space.is_searched(name, point)}
    return point.keys() == searched and not space.outside(point)


def _as_trial(result: Values, space: Space) -> FrozenTrial:
    params = result["params"]
    # JSON has made text of the rungs.
    rungs = {int(step): value for step, value in result["rungs"].items()}
    values = result["values"]
    return create_trial(
        state=TrialState.PRUNED if values is None else TrialState.COMPLETE,
        params=params,
        distributions={name: space.distributions[name] for name in params},
        values=values,
        intermediate_values=rungs,
        constraints=result.get("constraints"),
    )


def _load(name: str, folder: Path) -> Study:
    try:
        earlier = find_search(name)
    except ConfigError as error:
        raise ConfigError(f"{KEY}: {error}") from None
    if earlier.folder == folder:
        raise refusal(KEY, name, "is this study; name earlier ones")
    return earlier


def _take(earlier: Study, matching: Matching, settings: StudySettings) -> _Taken:
    """Take an earlier study's results, and its best points."""
    results = []
    left_out: Counter[str] = Counter()
    for trial in earlier.trials():
        if trial.state == TrialState.WAITING:
            continue
        try:
            _require_measured(earlier, trial, settings)
            results.append(_result(earlier, trial, matching, settings))
        except Unmatched as reason:
            left_out[str(reason)] += 1
    # The sampler has seen the others.
    count = 1 if results else BEST_POINTS
    points = _best_points(earlier, matching, settings.parsed_constraints, count)
    note = _describe_counts(len(results), len(points))
    if left_out:
        note += f"; {counted(left_out.total(), 'trial')} left out: "
        reasons = left_out.most_common()
        note += ", ".join(f"{count} ({reason})" for reason, count in reasons)
    return _Taken(results, points, note)


def _describe_counts(results: int, points: int) -> str:
    return f"{counted(results, 'result')} for the sampler, {counted(points, 'point')} to train"


def _require_measured(
    earlier: Study, trial: FrozenTrial, settings: StudySettings
) -> None:
    """Raise Unmatched for a trial that gives a sampler nothing to learn from."""
    if not learns_from_results(settings):
        raise Unmatched("this sampler does not learn from them")
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        raise Unmatched("failed" if trial.state.is_finished() else "not finished")
    # Optuna ranks pruned trials by their rungs, for one objective only.
    if trial.state == TrialState.PRUNED and len(earlier.objectives) > 1:
        raise Unmatched("pruned, with several objectives")
    values = trial.values or list(trial.intermediate_values.values())
    if not values or not all(map(math.isfinite, values)):
        raise Unmatched("no finite value")


def _result(
    earlier: Study, trial: FrozenTrial, matching: Matching, settings: StudySettings
) -> dict[str, Any]:
    """Return a trial of an earlier study as a result of this one.

    Raises:
        Unmatched: a trial of this study can't have its values, or a constraint's figure is missing.
    """
    values = trial_values(earlier, trial)
    space = Space.from_dict(stored_space(earlier.optuna.user_attrs["terms"]))
    searched = searched_keys(space, trial, values)
    return {
        "params": matching.point(values, searched),
        "values": trial.values,
        "rungs": trial.intermediate_values,
        "constraints": _violations(earlier, trial, settings.parsed_constraints),
    }


def _violations(
    earlier: Study, trial: FrozenTrial, constraints: list[Constraint]
) -> dict[str, float]:
    """Return how far a trial of an earlier study is beyond each of this study's bounds.

    Raises:
        Unmatched: it is complete, and its result lacks a figure.
    """
    distances = _known_violations(earlier, trial, constraints)
    for constraint in constraints:
        if constraint.text not in distances and trial.state == TrialState.COMPLETE:
            raise Unmatched(f"no {constraint.name} for a constraint")
    return distances


def _known_violations(
    earlier: Study, trial: FrozenTrial, constraints: list[Constraint]
) -> dict[str, float]:
    result = read_json(earlier.folder_of(trial.number).result) or {}
    figures = {**result, **result.get("metrics", {})}
    distances = violations(constraints, figures, is_final=False)
    for constraint in constraints:
        text = constraint.text
        # The same bound as the earlier study's, whose result is not on this machine.
        if text not in distances and text in trial.constraints:
            distances[text] = trial.constraints[text]
    return distances


def _best_points(
    earlier: Study, matching: Matching, constraints: list[Constraint], count: int
) -> list[Point]:
    """Return the points of the best trials, as far as they lie in this study's space.

    Trials that are known to violate a constraint are left out.
    """
    space = Space.from_dict(stored_space(earlier.optuna.user_attrs["terms"]))
    points: list[Point] = []
    for trial in earlier.ranked():
        distances = _known_violations(earlier, trial, constraints)
        if any(distance > 0 for distance in distances.values()):
            continue
        values = trial_values(earlier, trial)
        # What the earlier study has not searched is left to this study's sampler.
        point = matching.partial_point(values, searched_keys(space, trial, values))
        if point and point not in points:
            points.append(point)
        if len(points) == count:
            break
    return points
