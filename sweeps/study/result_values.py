"""All values that make a trial's result, by config key: those of a study, and of a trial of it.

A study's terms lack what the study searches. Of an earlier trial such values are its parameters
and, where it has none (a condition is not met, a variant leaves a key out), those of its run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from finetune.run.identity import KEYS_WITHOUT_EFFECT
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.load import read_run_config
from finetune.run.resources import shared_resources
from sweeps.space.constraints import KEY as CONSTRAINTS
from sweeps.space.encoding import encode
from sweeps.space.space import Point, Space
from sweeps.study.inside import point_of
from sweeps.study.session import Session
from sweeps.study.study import Study
from sweeps.study.terms import is_group, stored_space

Values = Mapping[str, Any]
"""Values by config key, encoded as parameters are."""

BASE = "model.name_or_path"

RATE = "optimizer.learning_rate"
"""Where the config gives none, it depends on the base."""

DECIDED = (
    "trainer.engine",
    "trainer.gradient_checkpointing",
    "trainer.eval_steps",
    "trainer.gpus",
)
"""Keys that a study may decide for its trials: a study's terms have them as its user gave them."""


@dataclass(frozen=True)
class ConfigValues:
    """The values of a study's config."""

    defaults: Values
    """The config's own values."""
    sets: Mapping[str, Mapping[Any, Values]]
    """What each choice of a parameter that stands for several keys sets: variants and groups."""
    at: Callable[[Point], Values] | None = None
    """Composes the config at a point; None: what no parameter sets has the config's own value."""


def read_config_values(session: Session) -> ConfigValues:
    """Read the values of a session's config, and those that its variants and groups set."""
    defaults = _encoded(session.common)
    space = session.space

    def at(point: Point) -> Values:
        return _composed_values(session, space.overrides(point))

    sets: dict[str, dict[Any, Values]] = {}
    for name, distribution in space.distributions.items():
        if name not in space.variants and not is_group(name) and name != BASE:
            continue
        assert isinstance(distribution, CategoricalDistribution)
        sets[name] = {}
        for choice in distribution.choices:
            try:
                values = at({name: choice})
            # It is allowed with other values than the config's own: no earlier trial is sought.
            except ConfigError:
                continue
            keys = _keys_of(space, name, values)
            # A key that only one of several variants adds is missing with the others.
            sets[name][choice] = {key: values[key] for key in keys if key in values}
    # A reference, as lora.alpha='${lora.r}', has another value at each point.
    has_reference = "${" in str([space.fixed, space.variants, space.distributions])
    return ConfigValues(defaults, sets, at if has_reference else None)


def study_values(terms: Values) -> dict[str, Any]:
    """Return the values that all trials of a study share, with its objective and its rows."""
    values = {}
    for key, value in terms.items():
        # Constraints make no result: they are compared with it.
        if not key.startswith("space.") and key != CONSTRAINTS:
            values[key] = encode(value)
    return values


class TrialValues:
    """The values of a study's trials. Its terms and its space are read once.

    Args:
        study: the study.
    """

    def __init__(self, study: Study) -> None:
        terms = study.optuna.user_attrs["terms"]
        self._study = study
        self._space = Space.from_dict(stored_space(terms))
        self._shared = study_values(terms)

    def of(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return all values that have made a finished trial's result, as far as they are known."""
        values = dict(self._shared)
        for name, value in point_of(trial).items():
            variants = self._space.variants.get(name, {})
            for key, each in variants.get(value, {name: value}).items():
                # The keys of a group are known from the run only.
                if not is_group(key):
                    values[key.lstrip("+")] = each
        for key, value in _recorded_values(self._study, trial).items():
            if key not in values or key not in DECIDED:
                values[key] = value
        return values

    def searched_keys(self, trial: FrozenTrial, values: Values) -> set[str]:
        """Return the keys of a trial's config that its parameters have set.

        Args:
            trial: the trial.
            values: its values.
        """
        keys: set[str] = set()
        for name in point_of(trial):
            keys |= _keys_of(self._space, name, values)
        return keys


def _keys_of(space: Space, name: str, values: Values) -> set[str]:
    """Return the keys that a parameter sets, in a config with some values."""
    keys: set[str] = set()
    for key in space.keys_of(name):
        plain = key.lstrip("+")
        if not is_group(key):
            keys.add(plain)
        prefix = plain.replace("/", ".")
        if is_group(key):
            keys |= {each for each in values if each.startswith(prefix)}
    if BASE in keys:
        keys.add(RATE)
    # What is searched by itself takes precedence.
    others = {key.lstrip("+") for key in space.config_keys}
    others -= {key.lstrip("+") for key in space.keys_of(name)}
    return keys - others


def _composed_values(session: Session, overrides: list[str]) -> dict[str, Any]:
    composed = session.compose(0, overrides)
    # For the interpolations `${hydra:…}` in the config.
    HydraConfig.instance().set_config(composed)
    config = RunConfig.from_hydra(composed)
    common = session.common
    if config.optimizer.learning_rate is None and config.model == common.model:
        rate = common.optimizer.learning_rate
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        config = dataclasses.replace(config, optimizer=optimizer)
    # Only the rate of another base is looked for, which the log says.
    return _encoded(resolve_learning_rate(config, shared_resources))


def _recorded_values(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of a trial's run, with the defaults of keys that it did not know."""
    try:
        values = _encoded(read_run_config(study.folder_of(trial.number).path))
    # The run is not on this machine, or of a version whose values are no longer allowed.
    except ConfigError:
        return {}
    # Smaller batches after running out of memory: the steps are those that were asked for.
    shrunk = [
        override.partition("=")[0] for override in trial.user_attrs.get("shrunk", [])
    ]
    return {key: value for key, value in values.items() if key not in shrunk}


def _encoded(config: RunConfig) -> dict[str, Any]:
    values = {}
    for key, value in flatten(config.with_absolute_paths().to_dict()).items():
        # Without metrics, the section has no effect, as in a study's terms.
        is_neutral = key.startswith("evaluation.") and not config.evaluation.metrics
        if not is_neutral and not key.startswith(KEYS_WITHOUT_EFFECT):
            values[key] = encode(value)
    return values
