"""Earlier studies as a start for a new one: `hydra.sweeper.warm_start`.

A trial of an earlier study is a result if a trial of this study could have all its values: those
that either study searches, and those of their configs. The sampler treats results as trials that
it has seen. The best point is trained again; of a study without results, the best few. Results do
not count as this study's trials, so the winner is always a trial that this study has trained.

What is taken stands in the study's storage, by the earlier study's name: a resumed study takes
nothing twice, and workers on all machines read the same results.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from finetune.errors import ConfigError, refusal
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.earlier_study import describe_counts, take
from sweeps.study.find_study import find_search
from sweeps.study.matching import Matching
from sweeps.study.result_values import ConfigValues, Values, study_values
from sweeps.study.study import Study

log = logging.getLogger(__name__)

KEY = "hydra.sweeper.warm_start"

EARLIER = "earlier"
"""The study's attribute with what was taken of each earlier study: results, points and a note."""


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
            given = take(_load(name, study.folder), matching, settings)
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
        counts = describe_counts(len(taken["results"]), len(taken["points"]))
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
