"""A study's search space: the searched parameters, points in the space, and grids over it."""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from finetune.errors import ConfigError, refusal
from sweeps.space.distributions import describe, distribution_or_value, grid_values, widen
from sweeps.space.encoding import NULL, encode

Point = dict[str, Any]
"""One encoded value for each searched parameter."""

NOT_SEARCHABLE = (
    r"\+*(dataset(?!\.limit\b)|objective|objective_at|name|resume|trainer\.engine|tracker|hub"
    r"|search|hydra)\b.*"
)
"""Parameters that no search may vary.

Trials would be evaluated on other rows or by another objective, or would store results elsewhere.
"""


RELATIVE = "relative"
"""A tag: `tag(log, relative, interval(0.1, 10))` is in multiples of the config's own value."""


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
        texts = [f"{name}={_as_text(value)}" for name, value in params.items()]
        parameters: dict[str, tuple[str, Any]] = {}
        deletions = []
        relative: dict[str, bool] = {}
        for override in _parse_overrides([*texts, *arguments]):
            if override.is_delete():
                deletions.append(str(override.input_line))
                continue
            name = override.get_key_element()
            # `+key` and `key` are the same parameter: the later one replaces the earlier.
            parameters[name.lstrip("+")] = (name, distribution_or_value(override))
            relative[name] = _is_relative(override)
        distributions: dict[str, BaseDistribution] = {}
        fixed: dict[str, Any] = {}
        for name, meaning in parameters.values():
            if isinstance(meaning, BaseDistribution):
                distributions[name] = meaning
            else:
                fixed[name] = meaning
        _require_searchable(distributions)
        relative_names = frozenset(name for name in distributions if relative[name])
        return cls(distributions, fixed, deletions, relative_names)

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
            value = OmegaConf.select(composed, name.lstrip("+"))
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or value <= 0:
                reason = (
                    "a relative interval is in multiples of the config's own value, "
                    "which must be a number above 0"
                )
                raise refusal(name.lstrip("+"), value, reason)
            multiples = distributions[name]
            assert isinstance(multiples, IntDistribution | FloatDistribution)
            low = _rounded(multiples.low * value)
            high = _rounded(multiples.high * value)
            distributions[name] = FloatDistribution(low, high, log=multiples.log)
        return dataclasses.replace(self, distributions=distributions, relative=frozenset())

    def overrides(self, point: Point) -> list[str]:
        """Return the command-line overrides of a trial at a point."""
        return [*self.fixed_texts, *(f"{name}={value}" for name, value in point.items())]

    @property
    def fixed_texts(self) -> list[str]:
        """The command-line overrides that all trials share."""
        return [*(f"{name}={value}" for name, value in self.fixed.items()), *self.fixed_overrides]

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
            value = group_choices[key] if key in group_choices else OmegaConf.select(composed, key)
            encoded = encode(value)
            if encoded == NULL and not _has_null(distribution):
                return None
            point[name] = encoded
        return point

    def widened(self, point: Point) -> tuple["Space", list[str]]:
        """Extend the space so that it contains a point.

        Returns:
            The space, and a line for the user on each parameter whose distribution was extended.
        """
        distributions = dict(self.distributions)
        lines = []
        for name, value in point.items():
            distributions[name] = widen(name, self.distributions[name], value)
            if distributions[name] != self.distributions[name]:
                before = describe(self.distributions[name])
                lines.append(
                    f"{name}={value}: the config's own value lies outside {before}, "
                    "which now holds it"
                )
        return dataclasses.replace(self, distributions=distributions), lines

    def require(self, key: str, point: Mapping[str, Any]) -> None:
        """Refuse a point that lies outside the space.

        Args:
            key: the config key that the point was given under, for the error.
            point: values of some or all searched parameters.

        Raises:
            ConfigError: a parameter is not searched, or its value lies outside its distribution.
        """
        for name, value in point.items():
            if name not in self.distributions:
                allowed = ", ".join(self.distributions)
                raise ConfigError(f"{key}: {name} is not searched; allowed: {allowed}")
            distribution = self.distributions[name]
            if widen(f"{key}: {name}", distribution, value) != distribution:
                raise ConfigError(f"{key}: {name}={value} lies outside {describe(distribution)}")

    def extremes(self) -> list[Point]:
        """Return a few points that together have every choice and both ends of every range."""
        values: dict[str, list[Any]] = {}
        for name, distribution in self.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                values[name] = list(distribution.choices)
            else:
                assert isinstance(distribution, IntDistribution | FloatDistribution)
                values[name] = [distribution.low, distribution.high]
        count = max(map(len, values.values()), default=0)
        points = []
        for index in range(count):
            points.append({name: ends[index % len(ends)] for name, ends in values.items()})
        return points

    def grid(self, seed: int) -> list[Point]:
        """Return every point of a space of choices and steps, in an order shuffled by a seed.

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
        combinations = itertools.product(*values)
        points = [dict(zip(self.distributions, point, strict=True)) for point in combinations]
        random.Random(seed).shuffle(points)
        return points

    def to_dict(self) -> dict[str, Any]:
        """Return the distributions as plain values, for storage and comparison."""
        plain = {}
        for name, distribution in self.distributions.items():
            plain[name] = json.loads(distribution_to_json(distribution))
        return plain


def _is_relative(override: Override) -> bool:
    """Whether an override is an interval of multiples.

    Raises:
        ConfigError: the tag is on anything but an interval.
    """
    sweep = override.value()
    if not isinstance(sweep, Sweep) or RELATIVE not in sweep.tags:
        return False
    if not isinstance(sweep, IntervalSweep):
        reason = "the tag relative is for an interval, as interval(0.1, 10)"
        raise ConfigError(f"{override.input_line}: {reason}")
    return True


def _rounded(bound: float) -> float:
    """Round to 12 significant digits, so that 0.1 times 0.002 is shown as 0.0002."""
    return float(f"{bound:.12g}")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(encode(value))


def _has_null(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution) and NULL in distribution.choices


def _require_searchable(names: Mapping[str, BaseDistribution]) -> None:
    for name in names:
        if re.fullmatch(NOT_SEARCHABLE, name):
            raise ConfigError(
                f"{name}: can't be searched: all trials of a study are evaluated by the same "
                "objective on the same rows"
            )


def _parse_overrides(texts: list[str]) -> list[Override]:
    """Parse overrides as Hydra does. A glob over a config group needs an initialized Hydra."""
    hydra = GlobalHydra.instance()
    parser = OverridesParser.create(
        config_loader=hydra.config_loader() if hydra.is_initialized() else None
    )
    overrides: list[Override] = []
    for text in texts:
        try:
            overrides += parser.parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"{text}: {_parser_reason(error)}") from None
    return overrides


def _parser_reason(error: HydraException) -> str:
    """Return what Hydra's parser has to say, without its lines of boilerplate."""
    boilerplate = ("Error when parsing", "Error parsing", "See https")
    reasons = [line for line in str(error).splitlines() if not line.startswith(boilerplate)]
    return " ".join(reasons)
