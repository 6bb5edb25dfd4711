"""What a study searches: distributions from Hydra's sweep syntax, the config's own point in them, and grids."""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from finetune.config import ConfigError

Point = dict[str, Any]
"""A value for each searched parameter."""

SAME_FOR_ALL = r"\+*(dataset(?!\.limit\b)|objective|name|resume|trainer\.engine|tracker|hub|search)\b.*"
"""Parameters that a search may not vary: trials would be measured on other rows, by another measure, or elsewhere."""


@dataclass(frozen=True)
class Space:
    """The searched parameters, and the overrides that all trials have in common."""

    distributions: dict[str, BaseDistribution]
    fixed: dict[str, Any]
    """Parameters with one value."""
    fixed_overrides: list[str]
    """What is no parameter with a value: deletions."""

    @classmethod
    def parse(cls, params: Mapping[str, Any], arguments: Sequence[str]) -> "Space":
        """The space of `hydra.sweeper.params` and the command line, which wins."""
        texts = [f"{name}={value}" for name, value in params.items()]
        try:
            distributions, fixed, deletions = create_params_from_overrides([*texts, *arguments])
        except (ValueError, NotImplementedError, AssertionError) as error:
            raise ConfigError(f"search space: {' '.join(str(error).split())}") from None
        distributions = {name: what for name, what in distributions.items() if name not in fixed}
        for name in distributions:
            if re.fullmatch(SAME_FOR_ALL, name):
                raise ConfigError(
                    f"{name}: can't be searched: all trials of a study are measured alike, on the same rows"
                )
        return cls(distributions, fixed, deletions)

    def overrides(self, point: Point) -> list[str]:
        """The command line of a trial at a point."""
        return [*self.fixed_texts, *(f"{name}={value}" for name, value in point.items())]

    @property
    def fixed_texts(self) -> list[str]:
        """The command line that all trials have in common."""
        return [*(f"{name}={value}" for name, value in self.fixed.items()), *self.fixed_overrides]

    def point_of(self, composed: DictConfig) -> Point | None:
        """The config's own values of the searched parameters; None where it has none for one of them."""
        point: Point = {}
        for name in self.distributions:
            choices = composed.hydra.runtime.choices  # of groups
            value = choices[name] if name in choices else OmegaConf.select(composed, name)
            if value is None:
                return None
            point[name] = encode(value)
        return point

    def widened(self, point: Point) -> tuple["Space", list[str]]:
        """A space that holds a point, and a line for each parameter that had to be widened for it."""
        distributions, lines = dict(self.distributions), []
        for name, value in point.items():
            before = distributions[name]
            after = _widened(before, value)
            if after != before:
                lines.append(
                    f"{name}={value}: the config's own value lies outside {describe(before)}, which now holds it"
                )
                distributions[name] = after
        return dataclasses.replace(self, distributions=distributions), lines

    def require(self, key: str, point: Mapping[str, Any]) -> None:
        """Refuse a point that names an unknown parameter, or a value outside of the space."""
        for name, value in point.items():
            if name not in self.distributions:
                raise ConfigError(f"{key}: {name} is not searched; allowed: {', '.join(self.distributions)}")
            if _widened(self.distributions[name], value) != self.distributions[name]:
                raise ConfigError(f"{key}: {name}={value} lies outside {describe(self.distributions[name])}")

    def grid(self, seed: int) -> list[Point]:
        """Every point of a space of lists and steps, shuffled."""
        try:
            choices = [OptunaSweeperImpl._to_grid_sampler_choices(what) for what in self.distributions.values()]
        except ValueError:
            smooth = [name for name, what in self.distributions.items() if getattr(what, "step", 1) is None]
            raise ConfigError(f"{', '.join(smooth)}: a grid needs a choice or a range with a step") from None
        points = [dict(zip(self.distributions, values, strict=True)) for values in itertools.product(*choices)]
        random.Random(seed).shuffle(points)
        return points

    def to_dict(self) -> dict[str, Any]:
        """As plain values, to be kept and compared."""
        return {name: json.loads(distribution_to_json(what)) for name, what in self.distributions.items()}


def describe(distribution: BaseDistribution) -> str:
    """A distribution as the user writes it."""
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({', '.join(map(str, distribution.choices))})"
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    interval = f"interval({distribution.low}, {distribution.high})"
    return f"tag(log, {interval})" if distribution.log else interval


def encode(value: Any) -> Any:
    """A config's value as Hydra's sweep syntax has it: lists and odd texts as quoted text."""
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(str(encode(item)) for item in value)}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./:+@-]+", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return value


def _widened(distribution: BaseDistribution, value: Any) -> BaseDistribution:
    if isinstance(distribution, CategoricalDistribution):
        same = [choice for choice in distribution.choices if choice == value and type(choice) is type(value)]
        return distribution if same else CategoricalDistribution([*distribution.choices, value])
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{value}: no number, as {describe(distribution)} needs")
    if distribution._contains(float(value)):
        return distribution
    whole = isinstance(distribution, IntDistribution)
    if whole and value != int(value):
        raise ConfigError(f"{value}: no whole number, as {describe(distribution)} needs")
    if distribution.log and value <= 0:
        raise ConfigError(
            f"{value}: can't be part of {describe(distribution)}; hydra.sweeper.baseline=false goes without"
        )
    low, high = min(distribution.low, value), max(distribution.high, value)
    if whole:
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)
