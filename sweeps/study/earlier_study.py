"""What an earlier study gives a new one: results for its sampler, and points to train again."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from finetune.files.atomic import read_json
from finetune.quantities import counted
from sweeps.space.constraints import Constraint, violations
from sweeps.space.samplers import learns_from_results
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point
from sweeps.study.matching import Matching, Unmatched
from sweeps.study.result_values import TrialValues
from sweeps.study.study import Study

BEST_POINTS = 3
"""How many of the best points of a study without usable results are trained again."""


@dataclass(frozen=True)
class Taken:
    """What one earlier study gives."""

    results: list[dict[str, Any]]
    points: list[Point]
    note: str
    """How much it is, and what is left out, in one line."""


def take(earlier: Study, matching: Matching, settings: StudySettings) -> Taken:
    """Take an earlier study's results, and its best points."""
    results = []
    left_out: Counter[str] = Counter()
    trial_values = TrialValues(earlier)
    for trial in earlier.trials():
        if trial.state == TrialState.WAITING:
            continue
        try:
            _require_measured(earlier, trial, settings)
            results.append(_result(earlier, trial, trial_values, matching, settings))
        except Unmatched as reason:
            left_out[str(reason)] += 1
    # The sampler has seen the others.
    count = 1 if results else BEST_POINTS
    points = _best_points(
        earlier, trial_values, matching, settings.parsed_constraints, count
    )
    note = describe_counts(len(results), len(points))
    if left_out:
        note += f"; {counted(left_out.total(), 'trial')} left out: "
        reasons = left_out.most_common()
        note += ", ".join(f"{count} ({reason})" for reason, count in reasons)
    return Taken(results, points, note)


def describe_counts(results: int, points: int) -> str:
    """Say how many results and points are taken."""
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
    earlier: Study,
    trial: FrozenTrial,
    trial_values: TrialValues,
    matching: Matching,
    settings: StudySettings,
) -> dict[str, Any]:
    """Return a trial of an earlier study as a result of this one.

    Raises:
        Unmatched: a trial of this study can't have its values, or a constraint's figure is missing.
    """
    values = trial_values.of(trial)
    searched = trial_values.searched_keys(trial, values)
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
    earlier: Study,
    trial_values: TrialValues,
    matching: Matching,
    constraints: list[Constraint],
    count: int,
) -> list[Point]:
    """Return the points of the best trials, as far as they lie in this study's space.

    Trials that are known to violate a constraint are left out.
    """
    points: list[Point] = []
    for trial in earlier.ranked():
        distances = _known_violations(earlier, trial, constraints)
        if any(distance > 0 for distance in distances.values()):
            continue
        values = trial_values.of(trial)
        # What the earlier study has not searched is left to this study's sampler.
        searched = trial_values.searched_keys(trial, values)
        point = matching.partial_point(values, searched)
        if point and point not in points:
            points.append(point)
        if len(points) == count:
            break
    return points
