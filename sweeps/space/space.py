"""A study's search space: the searched parameters, points in the space, and grids over it."""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from finetune.config.convert import is_number
from finetune.errors import ConfigError, refusal
from sweeps.space.distributions import (
    contains,
    describe,
    distribution_or_value,
    grid_values,
    random_value,
    value_count,
)
from sweeps.space.encoding import NULL, encode
from sweeps.space.overrides import (
    is_relative,
    parse_overrides,
    refuse_quoted_list,
    require_searchable,
)

Point = dict[str, Any]
"""One encoded value for each searched parameter."""


@dataclass(frozen=True)
class Space:
    """The searched parameters, and the overrides that all trials share."""

    distributions: dict[str, BaseDistribution]
    fixed: dict[str, Any]
    """Parameters with one value."""
    fixed_overrides: list[str]
    """Overrides that delete a key, as the user wrote them."""
    relative: frozenset[str] = frozenset()
    """Parameters whose interval is in multiples of the config's own value, see `scaled`."""

    @classmethod
    def parse(cls, params: Mapping[str, Any], arguments: Sequence[str]) -> "Space":
        """Parse `hydra.sweeper.params` and the command line, which takes precedence.

        Args:
            params: the sweep syntax, or the value, of each parameter.
            arguments: overrides of the command line.

        Raises:
            ConfigError: an override can't be parsed, or its parameter can't be searched.
        """
        parameters: dict[str, tuple[str, Any]] = {}
        deletions = []
        relative_names = set()
        for override in parse_overrides(params, arguments):
            if override.is_delete():
                deletions.append(str(override.input_line))
                continue
            name = override.get_key_element()
            searched_or_text = distribution_or_value(override)
            values = [searched_or_text]
            if isinstance(searched_or_text, CategoricalDistribution):
                values = list(searched_or_text.choices)
            refuse_quoted_list(override, values)
            # `+key` and `key` are the same parameter: the later one replaces the earlier.
            parameters[name.lstrip("+")] = (name, searched_or_text)
            if is_relative(override):
                relative_names.add(name)
            else:
                relative_names.discard(name)
        distributions: dict[str, BaseDistribution] = {}
        fixed: dict[str, Any] = {}
        for name, distribution_or_text in parameters.values():
            if isinstance(distribution_or_text, BaseDistribution):
                distributions[name] = distribution_or_text
            else:
                fixed[name] = distribution_or_text
        require_searchable(distributions)
        relative = frozenset(relative_names & distributions.keys())
        return cls(distributions, fixed, deletions, relative)

    def scaled(self, composed: DictConfig) -> "Space":
        """Convert relative intervals to the units of their parameters.

        Args:
            composed: the config of a trial before anything is searched, with the learning rate
                resolved.

        Raises:
            ConfigError: the config's own value of such a parameter is no number above 0.
        """
        distributions = dict(self.distributions)
        for name in self.relative:
            value = _positive_number(composed, name.lstrip("+"))
            multiples = distributions[name]
            assert isinstance(multiples, IntDistribution | FloatDistribution)
            low = _rounded(multiples.low * value)
            high = _rounded(multiples.high * value)
            distributions[name] = FloatDistribution(low, high, log=multiples.log)
        return dataclasses.replace(
            self, distributions=distributions, relative=frozenset()
        )

    def overrides(self, point: Point) -> list[str]:
        """Return the command-line overrides of a trial at a point."""
        return self.fixed_texts + _assignments(point)

    @property
    def fixed_texts(self) -> list[str]:
        """The command-line overrides that all trials share."""
        return _assignments(self.fixed) + self.fixed_overrides

    def point_of(self, composed: DictConfig) -> Point | None:
        """Return the values that a composed config has for the searched parameters.

        Args:
            composed: the config, with the `hydra` node.

        Returns:
            The point; None if the config has no value for one of the parameters.
        """
        group_choices = composed.hydra.runtime.choices
        point: Point = {}
        for name, distribution in self.distributions.items():
            key = name.lstrip("+")
            value = OmegaConf.select(composed, key)
            # A searched config group has the name of its choice as its value.
            if key in group_choices:
                value = group_choices[key]
            encoded = encode(value)
            if encoded == NULL and not _has_null(distribution):
                return None
            point[name] = encoded
        return point

    def outside(self, point: Point) -> Point:
        """Return a point's values of searched parameters that lie outside the space."""
        outside: Point = {}
        for name, value in point.items():
            distribution = self.distributions.get(name)
            if distribution is not None and not contains(distribution, value):
                outside[name] = value
        return outside

    def require(self, key: str, point: Point) -> None:
        """Refuse a point that lies outside the space.

        Args:
            key: the config key that the point was given under, for the error.
            point: values of some or all searched parameters.

        Raises:
            ConfigError: a parameter is not searched, or its value lies outside its distribution.
        """
        for name in point:
            if name not in self.distributions:
                allowed = ", ".join(self.distributions)
                raise ConfigError(f"{key}: {name} is not searched; allowed: {allowed}")
        for name, value in self.outside(point).items():
            described = describe(self.distributions[name])
            raise ConfigError(f"{key}: {name}={value} lies outside {described}")

    def extremes(self) -> list[Point]:
        """Return a few points that together have every choice and both ends of every range."""
        values: dict[str, list[Any]] = {}
        for name, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                values[name] = list(distribution.choices)
            else:
                assert isinstance(distribution, IntDistribution | FloatDistribution)
                values[name] = [distribution.low, distribution.high]
        lengths = [len(extremes) for extremes in values.values()]
        count = max(lengths, default=0)
        points = []
        for index in range(count):
            point: Point = {}
            for name, extremes in values.items():
                # A parameter with fewer extremes than another begins again with its first.
                point[name] = extremes[index % len(extremes)]
            points.append(point)
        return points

    @property
    def size(self) -> int | None:
        """The number of points; None: a parameter is continuous."""
        counts = []
        for distribution in self.distributions.values():
            count = value_count(distribution)
            if count is None:
                return None
            counts.append(count)
        return math.prod(counts)

    def random_point(self, draw: random.Random) -> Point:
        """Draw a point of a space in which no parameter is continuous."""
        point: Point = {}
        for name, distribution in self.distributions.items():
            point[name] = random_value(distribution, draw)
        return point

    def grid(self, seed: int) -> list[Point]:
        """Return every point of a space of choices and steps, in an order shuffled by a seed.

        Args:
            seed: the run's seed, so that a resumed study has the same order.

        Raises:
            ConfigError: a parameter is continuous.
        """
        values: list[list[Any]] = []
        continuous = []
        for name, distribution in self.distributions.items():
            choices = grid_values(distribution)
            if choices is None:
                continuous.append(name)
            else:
                values.append(choices)
        if continuous:
            names = ", ".join(continuous)
            raise ConfigError(f"{names}: a grid needs a choice or a range with a step")
        points = []
        for combination in itertools.product(*values):
            point = dict(zip(self.distributions, combination, strict=True))
            points.append(point)
        # Shuffled, so that a study which is stopped early has seen all regions of the grid.
        random.Random(seed).shuffle(points)
        return points

    def to_dict(self) -> dict[str, Any]:
        """Return the distributions as plain values, for storage and comparison."""
        plain = {}
        for name, distribution in self.distributions.items():
            plain[name] = json.loads(distribution_to_json(distribution))
        return plain


def _positive_number(composed: DictConfig, key: str) -> float:
    """Return the config's own value of a key that is searched in multiples of it."""
    value = OmegaConf.select(composed, key)
    if not is_number(value) or value <= 0:
        reason = (
            "a relative interval is in multiples of the config's own value, "
            "which must be a number above 0"
        )
        raise refusal(key, value, reason)
    number: float = value
    return number


def _assignments(values: Mapping[str, Any]) -> list[str]:
    assignments = []
    for name, value in values.items():
        # A user's function may suggest None as it is.
        text = NULL if value is None else value
        assignments.append(f"{name}={text}")
    return assignments


def _rounded(bound: float) -> float:
    """Round to 12 significant digits, so that 0.1 times 0.002 is shown as 0.0002."""
    return float(f"{bound:.12g}")


def _has_null(distribution: BaseDistribution) -> bool:
    if not isinstance(distribution, CategoricalDistribution):
        return False
    return NULL in distribution.choices
