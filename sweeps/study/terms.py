"""The terms of a study: the config that all its trials share, so that they can be compared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError, refusal
from finetune.run.identity import KEYS_WITHOUT_EFFECT
from sweeps.compat import enqueued_point
from sweeps.space.constraints import KEY as CONSTRAINTS
from sweeps.space.distributions import describe
from sweeps.space.settings import StudySettings
from sweeps.space.space import Point, Space
from sweeps.study.roles import ADDED, role

OTHER_NAME = "give another hydra.sweeper.study_name"


def study_terms(
    config: RunConfig,
    space: Space,
    settings: StudySettings,
    dataset_fingerprint: str,
) -> dict[str, Any]:
    """Collect the config without what is searched, the objective, the data, and the space.

    Args:
        config: the config's own values.
        space: the searched parameters.
        settings: the study's settings.
        dataset_fingerprint: identifies the rows of the data set.

    Returns:
        A value for each config key, and for each parameter an entry `space.<name>`.
    """
    # `+key` is Hydra's syntax for a key that the config lacks.
    searched = {name.lstrip("+") for name in space.config_keys}
    # A searched config group (`lora/target`, `optimizer`) sets all keys below it.
    groups = []
    for name in filter(is_group, searched):
        groups.append(name.replace("/", "."))
    excluded_prefixes = (*KEYS_WITHOUT_EFFECT, *groups)
    # Absolute paths, so that the same data has the same terms from any working directory.
    config_values = flatten(config.with_absolute_paths().to_dict())
    terms: dict[str, Any] = {}
    for key, value in config_values.items():
        # A study from before the section existed has none of its keys.
        is_neutral = key.startswith("evaluation.") and not config.evaluation.metrics
        is_of_tasks = key.startswith("evaluation.harness_")
        is_neutral = is_neutral or (is_of_tasks and not config.evaluation.has_tasks)
        is_excluded = key in searched or key.startswith(excluded_prefixes)
        if not is_excluded and not is_neutral:
            terms[key] = value
    terms["objective"] = config.objective
    terms["hydra.sweeper.direction"] = settings.directions
    # A study from before there were constraints has none.
    if settings.constraints:
        terms[CONSTRAINTS] = settings.constraints
    terms["dataset_fingerprint"] = dataset_fingerprint
    for name, distribution in space.to_dict().items():
        terms[f"space.{name}"] = distribution
    return terms


def is_group(name: str) -> bool:
    """Whether a parameter is a config group, which sets all keys below it."""
    return "/" in name or "." not in name


def stored_space(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a study searches from its terms, as `Space.to_dict` gave it."""
    space = {}
    for key, value in terms.items():
        if key.startswith("space."):
            space[key.removeprefix("space.")] = value
    return space


def require_same_terms(
    study: str, stored: Mapping[str, Any], terms: Mapping[str, Any]
) -> None:
    """Refuse terms that differ from those that a study began with.

    Args:
        study: the study's name.
        stored: the terms that the study's storage holds.
        terms: the terms of this session, as plain as JSON makes them.

    Raises:
        ConfigError: names the first key that differs, and both its values.
    """
    keys = {key.removeprefix("space.") for key in (*stored, *terms)}
    for key in sorted(keys):
        # A key may have moved from the config to the space or back.
        space_key = f"space.{key}"
        before = stored.get(space_key, stored.get(key))
        now = terms.get(space_key, terms.get(key))
        if before != now:
            is_searched = space_key in stored or space_key in terms
            section = "the search space" if is_searched else "the config"
            began = f"study {study} began with {json.dumps(before)} in {section}"
            choices = f"{OTHER_NAME}, or hydra.sweeper.allow_change=true to go on with the change"
            raise ConfigError(f"{key}={json.dumps(now)}: {began}; {choices}")


def require_changeable(
    study: str,
    stored: Mapping[str, Any],
    terms: Mapping[str, Any],
    trials: Sequence[FrozenTrial],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Refuse a change that no study can take, even with `allow_change`.

    Args:
        study: the study's name.
        stored: the terms that the study's storage holds.
        terms: the terms of this session.
        trials: the study's trials.
        distributions: the searched parameters of this session.

    Raises:
        ConfigError: the objective has changed, or a parameter's choices, which Optuna can't
            compare with those of the earlier trials; or a trial that a user has added by hand
            waits with a value that is not searched any more.
    """
    for key in ("objective", "hydra.sweeper.direction", CONSTRAINTS):
        if stored.get(key) != terms.get(key):
            reason = (
                f"study {study} judges its trials by {stored.get(key)}; {OTHER_NAME}"
            )
            raise refusal(key, terms.get(key), reason)
    for key, now in terms.items():
        before = stored.get(key) if key.startswith("space.") else None
        if before and before.get("variants") != now.get("variants"):
            name = key.removeprefix("space.")
            reason = f"study {study} has trials of other variants; {OTHER_NAME}"
            raise ConfigError(f"{name}: {reason}")
    for trial in trials:
        if role(trial) == ADDED:
            _require_searched(study, stored, terms, trial)
        for name in trial.distributions.keys() & distributions.keys():
            before = trial.distributions[name]
            now = distributions[name]
            # Optuna makes the same check when a trial asks for the parameter, in the middle of
            # the session.
            try:
                check_distribution_compatibility(before, now)
            except ValueError:
                reason = f"study {study} has trials of {describe(before)}, and choices can't change"
                raise refusal(name, describe(now), f"{reason}; {OTHER_NAME}") from None


def _require_searched(
    study: str, stored: Mapping[str, Any], terms: Mapping[str, Any], trial: FrozenTrial
) -> None:
    """Refuse a space with which a trial would train without a value that its user gave it."""
    for name, value in unsearched_values(stored, terms, trial).items():
        reason = (
            f"trial {trial.number} of study {study} was added with {name}={value} and waits, and "
            f"the new space does not search it there; train it first, without the change, or "
            f"{OTHER_NAME}"
        )
        raise ConfigError(f"{name}: {reason}")


def unsearched_values(
    stored: Mapping[str, Any], terms: Mapping[str, Any], trial: FrozenTrial
) -> Point:
    """Return the values that a trial waits with and that a changed space does not search there.

    Args:
        stored: the terms before the change.
        terms: the terms with the change.
        trial: a trial in any state.
    """
    if trial.state.is_finished():
        return {}
    point = enqueued_point(trial) or {}
    unsearched = Space.from_dict(stored_space(terms)).unsearched(point)
    before = Space.from_dict(stored_space(stored)).unsearched(point)
    # What a user's function suggests is in no space, and a running trial has its values.
    names = unsearched.keys() - before.keys() - trial.params.keys()
    return {name: unsearched[name] for name in point if name in names}


def has_new_config(stored: Mapping[str, Any], terms: Mapping[str, Any]) -> bool:
    """Whether anything has changed besides the search space."""
    for key, value in stored.items():
        if not key.startswith("space.") and terms.get(key) != value:
            return True
    return False
