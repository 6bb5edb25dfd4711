"""Points that a user puts into a study, also while it runs: `python -m sweeps add` and `clone`.

An added point is a waiting trial that exists in addition to those of `n_trials`; the next free slot
of any worker trains it.
"""

import dataclasses
import random
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import FrozenTrial, TrialState

from finetune.errors import ConfigError, did_you_mean, refusal
from finetune.files.lock import file_lock
from sweeps.compat import enqueued_point, waiting_trial
from sweeps.space.conditions import is_met
from sweeps.space.distributions import describe
from sweeps.space.encoding import encode
from sweeps.space.points import may_repeat, random_point
from sweeps.space.space import Point, Space
from sweeps.study.formatting import format_value, objective_cells
from sweeps.study.inside import point_of
from sweeps.study.roles import ADDED
from sweeps.study.study import OUT_OF_TIME, Study
from sweeps.study.terms import stored_space
from sweeps.study.trial_text import find_trial
from sweeps.study.untried import ATTEMPTS, is_among


def study_space(study: Study) -> Space:
    """Return the space that a study searches, as its storage has it.

    What only a user's function suggests is read from the trials that have it.
    """
    plain = stored_space(study.optuna.user_attrs["terms"])
    space = Space.from_dict(plain)
    distributions = dict(space.distributions)
    for trial in study.trials():
        distributions = trial.distributions | distributions
    return dataclasses.replace(space, distributions=distributions)


def read_point(study: Study, command: str, assignments: Sequence[str]) -> Point:
    """Read a point from `key=value` words.

    Args:
        study: the study.
        command: the command's name, for errors.
        assignments: the words, in Hydra's syntax.

    Raises:
        ConfigError: a word is no assignment, or its value lies outside the study's space.
    """
    space = study_space(study)
    names = {name.lstrip("+"): name for name in space.distributions}
    parser = OverridesParser.create()
    point: Point = {}
    for assignment in assignments:
        if "=" not in assignment:
            raise refusal(command, assignment, "must be KEY=VALUE, as lora.r=8")
        override = parser.parse_overrides([assignment])[0]
        key = override.get_key_element().lstrip("+~")
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(
                f"{assignment}: must be one value; each command adds one point"
            )
        if key not in names:
            raise ConfigError(f"{key}: is not searched; {did_you_mean(key, names)}")
        point[names[key]] = encode(override.value())
    space.require(command, point)
    return point


def changed_point(study: Study, number: int, assignments: Sequence[str]) -> Point:
    """Return a trial's point with changes.

    Args:
        study: the study.
        number: the trial.
        assignments: the changes, as `key=value` words.

    Raises:
        ConfigError: there is no such trial, it has no point yet, or the new point lies outside the
            study's space.
    """
    trial = find_trial(study, number)
    point = chosen_point(trial)
    if not point:
        raise ConfigError(
            f"trial {number}: has no point yet: the sampler chooses it at its start"
        )
    space = study_space(study)
    changes = read_point(study, "clone", assignments)
    changed = {**point, **changes}
    # The baseline has the config's own values of the keys of variants where no variant has them.
    for name in changes.keys() & space.variants.keys():
        for key in space.keys_of(name):
            changed.pop(key, None)
    for name in point.keys() & space.distributions.keys() - changes.keys():
        # Searched at the trial's own point, but not with the changes.
        if not space.is_searched(name, changed):
            del changed[name]
    _require_inside(space, number, changed)
    space.require("clone", changed)
    return changed


def _require_inside(space: Space, number: int, point: Point) -> None:
    """Refuse a clone that keeps values outside the space, as the baseline may have them.

    Raises:
        ConfigError: names the parameters to set.
    """
    outside = space.outside(point)
    if not outside:
        return
    settings = []
    for name, distribution in space.distributions.items():
        if not outside.keys().isdisjoint([name, *space.keys_of(name)]):
            key = name.lstrip("+")
            settings.append(f"{key}=VALUE from {describe(distribution)}")
    raise ConfigError(
        f"clone: trial {number} lies outside the space ({_describe_point(outside)}); "
        f"give {' and '.join(settings)}"
    )


def chosen_point(trial: FrozenTrial) -> Point:
    """Return the point of a trial, as far as it is chosen."""
    return {**(enqueued_point(trial) or {}), **point_of(trial)}


def add_point(study: Study, point: Point) -> int:
    """Add a waiting trial with a point, on top of the study's number of trials.

    Returns:
        The number of the trial.

    Raises:
        ConfigError: another trial has the point, or waits for it; or all points with its values
            are tried.
    """
    # No worker draws a point while the trials are compared with this one.
    with file_lock(study.lock_path):
        _require_new(study, point)
        return study.add_trial(waiting_trial(point, role=ADDED))


def _require_new(study: Study, point: Point) -> None:
    """Refuse a point that another trial has trained, trains or waits for.

    A failed trial, and one that ran out of time, have not shown what their point is worth.
    """
    tried = []
    for trial in study.trials():
        is_open = trial.user_attrs.get("reason") == OUT_OF_TIME
        if is_open or trial.state == TrialState.FAIL:
            continue
        tried.append(chosen_point(trial))
        if is_among(point, [chosen_point(trial)]):
            state = _describe_state(study, trial)
            raise ConfigError(
                f"trial {trial.number} has this point already ({state}): not added"
            )
    if not _has_untried(study_space(study), point, tried):
        values = _describe_point(point)
        raise ConfigError(f"{values}: every point with it is tried already: not added")


def _has_untried(space: Space, point: Point, tried: Sequence[Point]) -> bool:
    """Whether a trial with a point's values can be one that is not tried."""
    if not may_repeat(space):
        return True
    draw = random.Random(0)

    def continuous(_: str) -> float:
        return draw.random()

    # As many as the sampler draws before it trains a point again.
    drawn = (random_point(space, draw, point, continuous) for _ in range(ATTEMPTS))
    return any(not is_among(each, tried) for each in drawn)


def _describe_point(point: Point) -> str:
    return " ".join(f"{name}={format_value(value)}" for name, value in point.items())


def _describe_state(study: Study, trial: FrozenTrial) -> str:
    words = [trial.state.name.lower()]
    names = study.objectives
    for name, cell in zip(names, objective_cells(trial, len(names)), strict=True):
        if cell:
            words.append(f"{name} {cell}")
    return ", ".join(words)


def describe_added(study: Study, number: int, point: Point) -> str:
    """Say which trial has been added, what its sampler chooses, and when it trains."""
    line = f"trial {number} of {study.name}: {_describe_point(point)}"
    open_names = _open_names(study_space(study), point)
    if open_names:
        line += f"; the sampler chooses {', '.join(open_names)}"
    if study.trials(TrialState.RUNNING):
        return f"{line}; trains in the next free slot"
    return f"{line}; trains when the study's command is run again"


def _open_names(space: Space, point: Point) -> list[str]:
    """Return the parameters that a point leaves out and that its trial may search."""
    names: list[str] = []
    # A parameter comes after those that its condition names.
    for name in space.distributions:
        given = {}
        for other, allowed in space.conditions.get(name, {}).items():
            if other not in names:
                given[other] = allowed
        if name not in point and is_met(given, point):
            names.append(name)
    return names
