"""Earlier studies as a start for a new one: `hydra.sweeper.warm_start`.

A trial of an earlier study whose config differs from this study's in nothing but what this study
searches is a result: the sampler treats it as a trial that it has seen. Of a study without such
trials only the best points are taken, and trained again as trials of this study. Results do not
count as its trials, so the winner is always a trial that this study has trained.

What is taken stands in the study's storage, by the earlier study's name: a resumed study takes
nothing twice, and workers on all machines read the same results.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.errors import ConfigError, refusal
from sweeps.space.encoding import encode
from sweeps.space.samplers import learns_from_results
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.find_study import find_search
from sweeps.study.study import Study
from sweeps.study.terms import stored_space

log = logging.getLogger(__name__)

KEY = "hydra.sweeper.warm_start"

EARLIER = "earlier"
"""The study's attribute with what was taken: results, points and a note, by study."""

BEST_POINTS = 3
"""How many of the best points of a study without usable results are trained again."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Taken:
    """What one earlier study gives."""

    results: list[dict[str, Any]]
    points: list[Point]
    note: str


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
    study: Study, settings: StudySettings, space: Space
) -> list[tuple[str, Point]]:
    """Take the results and points of the earlier studies that are not taken yet.

    Args:
        study: the study, with its terms stored.
        settings: the study's settings.
        space: the searched parameters.

    Returns:
        Role and point of the trials that shall train points of earlier studies.

    Raises:
        ConfigError: there is no such study, or it is this one.
    """
    taken: dict[str, Any] = study.optuna.user_attrs.get(EARLIER, {})
    for name in settings.warm_start:
        if name in taken:
            continue
        earlier = _load(name, study.folder)
        given = _take(earlier, study, space, learns_from_results(settings))
        taken[name] = {"results": given.results, "points": given.points}
        study.optuna.set_user_attr(EARLIER, taken)
        log.info("warm start: %s: %s", name, given.note)
    points = []
    for given_by_name in taken.values():
        points += [("warm_start", point) for point in given_by_name["points"]]
    return points


def earlier_trials(study: Study, space: Space) -> list[FrozenTrial]:
    """Return the results of earlier studies that lie in a space, as trials for its sampler."""
    trials = []
    for taken in study.optuna.user_attrs.get(EARLIER, {}).values():
        for result in taken["results"]:
            params = _inside(space, result["params"])
            if params.keys() == space.distributions.keys():
                trials.append(_as_trial(result, params, space.distributions))
    return trials


def _as_trial(
    result: Values, params: Point, distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    # JSON has made text of the rungs.
    rungs = {int(step): value for step, value in result["rungs"].items()}
    values = result["values"]
    return create_trial(
        state=TrialState.PRUNED if values is None else TrialState.COMPLETE,
        params=params,
        distributions=distributions,
        values=values,
        intermediate_values=rungs,
    )


def _load(name: str, folder: Path) -> Study:
    try:
        earlier = find_search(name)
    except ConfigError as error:
        raise ConfigError(f"{KEY}: {error}") from None
    if earlier.folder == folder:
        raise refusal(KEY, name, "is this study; name earlier ones")
    return earlier


def _take(earlier: Study, study: Study, space: Space, learns: bool) -> _Taken:
    """Take an earlier study's results, or else its best points."""
    terms = study.optuna.user_attrs["terms"]
    stored = earlier.optuna.user_attrs["terms"]
    points = _best_points(earlier, space)
    if not points:
        return _Taken([], [], "no complete trial has values inside this space")
    if learns:
        results = list(_results(earlier, terms, space))
        if results:
            note = f"{_count(len(results), 'result')} for the sampler, and the best point to train"
            return _Taken(results, points[:1], note)
        difference = _first_difference(stored, terms)
        reason = f"no results, as {difference}"
    else:
        reason = "no results, as this sampler does not learn from them"
    return _Taken([], points, f"{_count(len(points), 'best point')} to train; {reason}")


def _results(earlier: Study, terms: Values, space: Space) -> Iterator[dict[str, Any]]:
    """Yield the trials whose configs have this study's values for all that it does not search."""
    stored = earlier.optuna.user_attrs["terms"]
    expected = _config_values(terms)
    has_one_objective = len(earlier.objectives) == 1
    for trial in earlier.trials(TrialState.COMPLETE, TrialState.PRUNED):
        # Optuna ranks pruned trials by their rungs, for one objective only.
        if trial.state == TrialState.PRUNED and not has_one_objective:
            continue
        values = trial.values or list(trial.intermediate_values.values())
        if not values or not all(map(math.isfinite, values)):
            continue
        config = _trial_values(stored, trial, space)
        point = _inside(space, _searched_values(config, space))
        if _is_whole(point, space) and _rest(config, space) == _rest(expected, space):
            yield {
                "params": point,
                "values": trial.values,
                "rungs": trial.intermediate_values,
            }


def _best_points(earlier: Study, space: Space) -> list[Point]:
    """Return the points of the best complete trials, as far as they lie in a space."""
    stored = earlier.optuna.user_attrs["terms"]
    earlier_space = Space.from_dict(stored_space(stored))
    points: list[Point] = []
    for trial in earlier.ranked():
        config = _trial_values(stored, trial, space)
        # What the earlier study has not searched is left to this study's sampler.
        searched = {name.lstrip("+") for name in trial.params}
        searched |= _variant_values(earlier_space, trial).keys()
        values = _searched_values(config, space)
        chosen = {
            name: value
            for name, value in values.items()
            if name.lstrip("+") in searched
        }
        point = _inside(space, chosen)
        if point and point not in points:
            points.append(point)
        if len(points) == BEST_POINTS:
            break
    return points


def _trial_values(terms: Values, trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """Return the values of a trial's config, encoded as parameters are.

    A variant stands for values of config keys; its name is a value only where this study's space
    means the same by it.
    """
    stored = Space.from_dict(stored_space(terms))
    values = _config_values(terms) | _variant_values(stored, trial)
    for name, value in trial.params.items():
        if stored.variants.get(name) == space.variants.get(name):
            values[name.lstrip("+")] = value
    return values


def _variant_values(space: Space, trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of config keys that a trial's variants stand for."""
    values: dict[str, Any] = {}
    for name, value in trial.params.items():
        if name in space.variants:
            keys = space.variants[name][value]
            values |= {key.lstrip("+"): each for key, each in keys.items()}
    return values


def _is_whole(point: Point, space: Space) -> bool:
    """Whether a point says all values of what a space searches.

    The terms of a study do not say the config's own values of what is searched in some trials only.
    """
    if point.keys() != space.distributions.keys():
        return False
    for name, variants in space.variants.items():
        keys = {key for values in variants.values() for key in values}
        if variants[point[name]].keys() != keys:
            return False
    return True


def _config_values(terms: Values) -> dict[str, Any]:
    values = {}
    for key, value in terms.items():
        if not key.startswith("space."):
            values[key] = encode(value)
    return values


def _searched_values(config: Values, space: Space) -> Point:
    """Return a config's values of what a space searches, as far as the config has them."""
    point: Point = {}
    for name in space.distributions:
        if name.lstrip("+") in config:
            point[name] = config[name.lstrip("+")]
    return point


def _rest(config: Values, space: Space) -> dict[str, Any]:
    """Return a config's values of what a space does not search."""
    names = {*space.distributions, *space.config_keys}
    searched = {name.lstrip("+") for name in names}
    return {key: value for key, value in config.items() if key not in searched}


def _inside(space: Space, point: Point) -> Point:
    """Return a point's values that lie in a space."""
    inside: Point = {}
    for name, value in point.items():
        try:
            space.require(KEY, {name: value})
        except ConfigError:
            continue
        inside[name] = value
    return inside


def _first_difference(stored: Values, terms: Values) -> str:
    """Say in what an earlier study's terms differ from this study's."""
    # A key that one of the studies searches does not hinder by itself.
    searched = {
        key.removeprefix("space.") for key in (*stored, *terms) if "space." in key
    }
    before = _config_values(stored)
    now = _config_values(terms)
    keys = sorted((before.keys() | now.keys()) - searched)
    for key in ("objective", "model.name_or_path", "dataset_fingerprint", *keys):
        if key == "dataset_fingerprint" and before.get(key) != now.get(key):
            return "its rows are others"
        if before.get(key) != now.get(key):
            return f"it has {key}={before.get(key)}, and this study {now.get(key)}"
    return "none of its trials has this study's values of what is not searched"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
