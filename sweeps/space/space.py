"""What a study searches: distributions from Hydra's sweep syntax, the config's own point in them, and grids."""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_optuna_distribution_from_override
from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from finetune.errors import ConfigError, refusal

Point = dict[str, Any]
"""A value for each searched parameter."""


SAME_FOR_ALL = (
    r"\+*(dataset(?!\.limit\b)|objective|objective_at|name|resume|trainer\.engine|tracker|hub|search|hydra)\b.*"
)
"""Parameters that a search may not vary: trials would be measured on other rows, by another measure, or elsewhere."""


RELATIVE = "relative"
"""A tag: `tag(log, relative, interval(0.1, 10))` is in multiples of the config's own value of the parameter."""


@dataclass(frozen=True)
class Space:
    """The searched parameters, and the overrides that all trials have in common."""

    distributions: dict[str, BaseDistribution]
    fixed: dict[str, Any]
    """Parameters with one value."""
    fixed_overrides: list[str]
    """What is no parameter with a value: deletions."""
    relative: frozenset[str] = frozenset()
    """Parameters whose interval is in multiples of the config's own value, until `scaled` has resolved them."""

    @classmethod
    def parse(cls, params: Mapping[str, Any], arguments: Sequence[str]) -> "Space":
        """The space of `hydra.sweeper.params` and the command line, which wins."""
        texts = [f"{name}={value if isinstance(value, str) else encode(value)}" for name, value in params.items()]
        found: dict[str, tuple[str, Any]] = {}
        deletions = []
        relative: dict[str, bool] = {}
        for override in _parsed([*texts, *arguments]):
            if override.is_delete():
                deletions.append(str(override.input_line))
                continue
            name = override.get_key_element()
            found[name.lstrip("+")] = (name, _meaning(override))
            relative[name] = _is_relative(override)
        distributions = {name: what for name, what in found.values() if isinstance(what, BaseDistribution)}
        fixed = {name: what for name, what in found.values() if not isinstance(what, BaseDistribution)}
        for name in distributions:
            if re.fullmatch(SAME_FOR_ALL, name):
                raise ConfigError(
                    f"{name}: can't be searched: all trials of a study are measured alike, on the same rows"
                )
        scaled = frozenset(name for name in distributions if relative[name])
        return cls(distributions, fixed, deletions, scaled)

    def scaled(self, composed: DictConfig) -> "Space":
        """The same space with every relative interval in the parameter's unit.

        Args:
            composed: The config of a trial before anything is searched, its learning rate resolved.

        Raises:
            ConfigError: The config has no number above 0 of a parameter whose interval is relative.
        """
        distributions = dict(self.distributions)
        for name in self.relative:
            value = OmegaConf.select(composed, name.lstrip("+"))
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                needs = "a relative interval is in multiples of the config's own value, which must be a number above 0"
                raise refusal(name.lstrip("+"), value, needs)
            multiples = distributions[name]
            assert isinstance(multiples, IntDistribution | FloatDistribution)
            low, high = (float(f"{multiple * value:.12g}") for multiple in (multiples.low, multiples.high))
            distributions[name] = FloatDistribution(low, high, log=multiples.log)
        return dataclasses.replace(self, distributions=distributions, relative=frozenset())

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
            bare = name.lstrip("+")
            value = encode(choices[bare] if bare in choices else OmegaConf.select(composed, bare))
            distribution = self.distributions[name]
            if value == NULL and not (
                isinstance(distribution, CategoricalDistribution) and NULL in distribution.choices
            ):
                return None
            point[name] = value
        return point

    def widened(self, point: Point) -> tuple["Space", list[str]]:
        """A space that holds a point, and a line for each parameter that had to be widened for it."""
        distributions, lines = dict(self.distributions), []
        for name, value in point.items():
            before = distributions[name]
            after = _widened(name, before, value)
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
            if _widened(f"{key}: {name}", self.distributions[name], value) != self.distributions[name]:
                raise ConfigError(f"{key}: {name}={value} lies outside {describe(self.distributions[name])}")

    def extremes(self) -> list[Point]:
        """Few points that have among them every choice and both ends of every range."""
        values: dict[str, list[Any]] = {}
        for name, what in self.distributions.items():
            if isinstance(what, CategoricalDistribution):
                values[name] = list(what.choices)
            else:
                assert isinstance(what, IntDistribution | FloatDistribution)
                values[name] = [what.low, what.high]
        count = max(map(len, values.values()), default=0)
        return [{name: those[index % len(those)] for name, those in values.items()} for index in range(count)]

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


def _parsed(texts: list[str]) -> list[Override]:
    """Overrides as Hydra reads them. Globs find their groups' choices as long as Hydra runs."""
    hydra = GlobalHydra.instance()
    parser = OverridesParser.create(config_loader=hydra.config_loader() if hydra.is_initialized() else None)
    overrides: list[Override] = []
    for text in texts:
        try:
            overrides += parser.parse_overrides([text])
        except HydraException as error:
            noise = ("Error when parsing", "Error parsing", "See https")
            reasons = [line for line in str(error).splitlines() if not line.startswith(noise)]
            raise ConfigError(f"{text}: {' '.join(reasons)}") from None
    return overrides


def _meaning(override: Override) -> Any:
    """An override's distribution, as hydra-optuna-sweeper has it; of one without a sweep its value as text.

    Choices stand as text that Hydra reads back as the same value, and in the order that they are written in:
    a search knows no other order, and a study that is gone on with must find the same ones.
    """
    sweep = override.value()
    try:
        if isinstance(sweep, Glob):
            return CategoricalDistribution([encode(choice) for choice in override.sweep_iterator()])
        distribution = create_optuna_distribution_from_override(override)
        if isinstance(distribution, CategoricalDistribution):
            assert isinstance(sweep, ChoiceSweep | RangeSweep)
            sweep.shuffle = False
            choices = override.sweep_iterator(transformer=Transformer.identity)
            return CategoricalDistribution([encode(choice) for choice in choices])
    except (ValueError, NotImplementedError, AssertionError, HydraException) as error:  # all are of users' mistakes
        raise ConfigError(f"{override.input_line}: {' '.join(str(error).split())}") from None
    return distribution


def _is_relative(override: Override) -> bool:
    """Whether an override is an interval of multiples. Raises ConfigError for the tag on anything else."""
    sweep = override.value()
    if not isinstance(sweep, Sweep) or RELATIVE not in sweep.tags:
        return False
    if not isinstance(sweep, IntervalSweep):
        raise ConfigError(f"{override.input_line}: the tag relative is for an interval, as interval(0.1, 10)")
    return True


def describe(distribution: BaseDistribution) -> str:
    """A distribution as the user writes it."""
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({', '.join(map(str, distribution.choices))})"
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if distribution.step is not None and not (isinstance(distribution, IntDistribution) and distribution.step == 1):
        return f"range({distribution.low}, …, {distribution.high}, step={distribution.step})"
    interval = f"interval({distribution.low}, {distribution.high})"
    interval = f"int({interval})" if isinstance(distribution, IntDistribution) else interval
    return f"tag(log, {interval})" if distribution.log else interval


NULL = "null"


def encode(value: Any) -> Any:
    """A config's value as Hydra's sweep syntax has it: numbers as they are, all else as text, quoted where need be."""
    if value is None:
        return NULL
    if isinstance(value, Mapping | DictConfig):
        return f"{{{','.join(f'{key}:{encode(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple | ListConfig):
        return f"[{','.join(str(encode(item)) for item in value)}]"
    text = value.text if isinstance(value, QuotedString) else value
    if isinstance(text, str) and not _is_word(text):
        return QuotedString(text, Quote.single).with_quotes()
    return text


def _is_word(text: str) -> bool:
    """Whether Hydra reads a text as itself without quotes."""
    try:
        float(text)
    except ValueError:
        return bool(re.fullmatch(r"[A-Za-z0-9_./:+@-]+", text)) and text.lower() not in ("true", "false", NULL)
    return False


def _widened(name: str, distribution: BaseDistribution, value: Any) -> BaseDistribution:
    """A distribution that holds a value: the same one, or a larger one of the same kind."""
    if isinstance(distribution, CategoricalDistribution):
        same = [
            choice
            for choice in distribution.choices
            if choice == value and isinstance(choice, bool) == isinstance(value, bool)
        ]
        return distribution if same else CategoricalDistribution([*distribution.choices, value])
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name}={value}: no number, as {describe(distribution)} needs")
    if distribution._contains(float(value)):
        return distribution
    whole = isinstance(distribution, IntDistribution)
    if whole and value != int(value):
        raise ConfigError(f"{name}={value}: no whole number, as {describe(distribution)} needs")
    if distribution.log and value <= 0:
        raise ConfigError(
            f"{name}={value}: can't be part of {describe(distribution)}; hydra.sweeper.baseline=false goes without"
        )
    low, high = min(distribution.low, value), max(distribution.high, value)
    step = None if distribution.step is None else _common(distribution.step, value - distribution.low)
    if whole:
        return IntDistribution(int(low), int(high), log=distribution.log, step=int(step or 1))
    return FloatDistribution(low, high, log=distribution.log, step=step)


def _common(step: float, gap: float) -> float:
    """The largest step that divides both."""
    one, other = Fraction(str(step)), Fraction(str(gap))
    whole = math.gcd(one.numerator * other.denominator, other.numerator * one.denominator)
    return float(Fraction(whole, one.denominator * other.denominator))
