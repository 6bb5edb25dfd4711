"""A study's search space: the searched parameters, and points inside and outside of it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import BaseTrial

from finetune.config.override_text import NULL
from finetune.errors import ConfigError
from sweeps.space.conditions import (
    Conditions,
    in_order,
    is_met,
    require_conditions,
)
from sweeps.space.distributions import contains, describe, has_choice, suggest
from sweeps.space.overrides import parse_overrides, require_searchable
from sweeps.space.parameters import Condition, Parameter, Variants, read_parameter

Point = dict[str, Any]
"""One encoded value for each searched parameter."""


@dataclass(frozen=True)
class Space:
    """The searched parameters, and the overrides that all trials share."""

    distributions: dict[str, BaseDistribution]
    """What is searched; a parameter comes after those that its condition names."""
    fixed: dict[str, Any]
    """Parameters with one value."""
    fixed_overrides: list[str]
    """Overrides that delete a key, as the user wrote them."""
    relative: frozenset[str] = frozenset()
    """Parameters whose interval is in multiples of the config's own value, see `scaled`."""
    variants: Mapping[str, Variants] = dataclasses.field(default_factory=dict)
    """The values of config keys that each variant of a parameter stands for."""
    conditions: Conditions = dataclasses.field(default_factory=dict)
    """The values of other parameters with which a parameter is searched."""

    @classmethod
    def parse(cls, params: Mapping[str, Any], arguments: Sequence[str]) -> "Space":
        """Parse `hydra.sweeper.params` and the command line, which takes precedence.

        Args:
            params: the sweep syntax, the long form, or the value, of each parameter.
            arguments: overrides of the command line.

        Raises:
            ConfigError: an override can't be parsed, or its parameter can't be searched.
        """
        parameters: dict[str, Parameter] = {}
        deletions = []
        for override in parse_overrides(params, arguments):
            if override.is_delete():
                deletions.append(str(override.input_line))
                continue
            parameter = read_parameter(override)
            # `+key` and `key` are the same parameter: the later one replaces the earlier.
            parameters[parameter.name.lstrip("+")] = parameter
        searched: dict[str, Parameter] = {}
        fixed: dict[str, Any] = {}
        for parameter in parameters.values():
            if isinstance(parameter.searched, BaseDistribution):
                searched[parameter.name] = parameter
            else:
                fixed[parameter.name] = parameter.searched
        conditions = {name: each.when for name, each in searched.items() if each.when}
        distributions = {name: each.searched for name, each in searched.items()}
        require_conditions(conditions, distributions)
        ordered = in_order(list(searched), conditions)
        space = cls(
            {name: distributions[name] for name in ordered},
            fixed,
            deletions,
            frozenset(name for name in searched if searched[name].is_relative),
            {name: each.variants for name, each in searched.items() if each.variants},
            conditions,
        )
        require_searchable(space.config_keys)
        return space

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Space":
        """Return the searched parameters of `to_dict`, without the overrides of all trials."""
        distributions = {}
        for name, stored in plain.items():
            distributions[name] = json_to_distribution(json.dumps(stored))
        variants = {name: stored.get("variants") for name, stored in plain.items()}
        conditions = {name: stored.get("when") for name, stored in plain.items()}
        return cls(
            distributions,
            fixed={},
            fixed_overrides=[],
            variants={name: each for name, each in variants.items() if each},
            conditions={name: each for name, each in conditions.items() if each},
        )

    @property
    def config_keys(self) -> list[str]:
        """The config keys that differ between trials, as they are written in overrides.

        Raises:
            ConfigError: a key is searched twice.
        """
        origins: dict[str, str] = {}
        for name in self.distributions:
            for key in self.keys_of(name):
                before = origins.setdefault(key.lstrip("+"), name)
                if before != name:
                    raise ConfigError(f"{key}: is searched by both {before} and {name}")
        return [key for name in self.distributions for key in self.keys_of(name)]

    def keys_of(self, name: str) -> list[str]:
        """Return the config keys that a parameter sets."""
        if name not in self.variants:
            return [name]
        # A dict in place of a set, to keep the order.
        keys: dict[str, None] = {}
        for values in self.variants[name].values():
            keys |= dict.fromkeys(values)
        return list(keys)

    def is_searched(self, name: str, point: Point) -> bool:
        """Whether a parameter is searched where the parameters before it have these values."""
        return is_met(self.conditions.get(name, {}), point)

    def searched_part(self, point: Point) -> Point:
        """Return a point without the parameters that are not searched there."""
        searched: Point = {}
        for name in self.distributions:
            if name in point and self.is_searched(name, searched):
                searched[name] = point[name]
        return searched

    def suggest(self, trial: BaseTrial, outside: Point) -> None:
        """Let a trial's sampler choose the parameters that are searched.

        Args:
            trial: the trial.
            outside: the trial's values that lie outside the space, which no sampler chooses.
        """
        for name, distribution in self.distributions.items():
            is_open = outside.keys().isdisjoint([name, *self.keys_of(name)])
            if is_open and self.is_searched(name, {**trial.params, **outside}):
                suggest(trial, name, distribution)

    def overrides(self, point: Point) -> list[str]:
        """Return the command-line overrides of a trial at a point."""
        values: dict[str, Any] = {}
        for name, value in point.items():
            values |= self.variants.get(name, {}).get(value, {name: value})
        return self.fixed_texts + _assignments(values)

    @property
    def fixed_texts(self) -> list[str]:
        """The command-line overrides that all trials share."""
        return _assignments(self.fixed) + self.fixed_overrides

    def outside(self, point: Point) -> Point:
        """Return a point's values of searched parameters that lie outside the space.

        Values of the keys that a variant would set lie outside: no variant has them all.
        """
        variant_keys = {key for name in self.variants for key in self.keys_of(name)}
        outside: Point = {}
        for name, value in point.items():
            distribution = self.distributions.get(name)
            is_value_outside = distribution and not contains(distribution, value)
            if is_value_outside or (distribution is None and name in variant_keys):
                outside[name] = value
        return outside

    def unsearched(self, point: Point) -> Point:
        """Return a point's values that no trial of this space trains with."""
        variant_keys = {key for name in self.variants for key in self.keys_of(name)}
        unsearched: Point = {}
        for name, value in point.items():
            is_named = name in self.distributions or name in variant_keys
            if not is_named or self._unmet(name, point):
                unsearched[name] = value
        return unsearched

    def _unmet(self, name: str, point: Point) -> Condition:
        """Return what a parameter's condition asks for and a point has another value of."""
        condition = self.conditions.get(name, {})
        return {
            other: allowed
            for other, allowed in condition.items()
            # Where the point leaves it open, the sampler may choose a value that fits.
            if other in point and not has_choice(allowed, point[other])
        }

    def require(self, key: str, point: Point) -> None:
        """Refuse a point that lies outside the space.

        Args:
            key: the config key that the point was given under, for the error.
            point: values of some or all searched parameters.

        Raises:
            ConfigError: a parameter is not searched, or not at this point, or its value lies
                outside its distribution.
        """
        for name in point:
            if name not in self.distributions:
                names = ", ".join(self.distributions)
                raise ConfigError(f"{key}: {name} is not searched; allowed: {names}")
        for name, value in self.outside(point).items():
            described = describe(self.distributions[name])
            raise ConfigError(f"{key}: {name}={value} lies outside {described}")
        for name in point:
            for other, allowed in self._unmet(name, point).items():
                needed = " or ".join(f"{other}={value}" for value in allowed)
                raise ConfigError(f"{key}: {name} is searched only with {needed}")

    def to_dict(self) -> dict[str, Any]:
        """Return the distributions as plain values, for storage and comparison."""
        plain = {}
        for name, distribution in self.distributions.items():
            plain[name] = json.loads(distribution_to_json(distribution))
            if name in self.variants:
                plain[name]["variants"] = self.variants[name]
            if name in self.conditions:
                plain[name]["when"] = self.conditions[name]
        return plain


def _assignments(values: Mapping[str, Any]) -> list[str]:
    assignments = []
    for name, value in values.items():
        # A user's function may suggest None as it is.
        text = NULL if value is None else value
        assignments.append(f"{name}={text}")
    return assignments
