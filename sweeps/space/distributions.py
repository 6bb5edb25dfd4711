"""Optuna's distributions: read from Hydra's sweep syntax, described, widened, listed, suggested."""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    FloatRange,
    Glob,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from finetune.config.convert import is_number
from finetune.errors import ConfigError
from sweeps import compat
from sweeps.space.encoding import encode

STEP_TOLERANCE = 1e-8
"""How far, in steps, a float may lie from a grid point of its range; Optuna's own tolerance."""


def distribution_or_value(override: Override) -> BaseDistribution | Any:
    """Read the distribution of a sweep override, or the value of any other override as text.

    Distributions are those of hydra-optuna-sweeper. Choices are encoded as text that Hydra reads
    back as the same value, in the order in which they are written: a shuffled order would differ
    between sessions, and a resumed study must find the same choices.

    Args:
        override: a parsed override, with a sweep or a plain value.

    Raises:
        ConfigError: the override is no valid search space.
    """
    sweep = override.value()
    if isinstance(sweep, str) and "${" in sweep:
        # As it is written: each trial's config resolves it. Hydra's text of it has escapes.
        return str(override.input_line).partition("=")[2]
    try:
        # hydra-optuna-sweeper knows no globs; here one is a choice of the options that match it.
        if isinstance(sweep, Glob):
            names = [encode(name) for name in override.sweep_iterator()]
            return CategoricalDistribution(names)
        distribution = compat.sweep_distribution(override)
        if isinstance(distribution, CategoricalDistribution):
            assert isinstance(sweep, ChoiceSweep | RangeSweep)
            sweep.shuffle = False
            values = override.sweep_iterator(transformer=Transformer.identity)
            choices = [encode(value) for value in values]
            return CategoricalDistribution(choices)
    # Hydra and its sweeper raise all of these for mistakes in the user's text.
    except (ValueError, NotImplementedError, AssertionError, HydraException) as error:
        on_one_line = " ".join(str(error).split())
        raise ConfigError(f"{override.input_line}: {on_one_line}") from None
    return distribution


def describe(distribution: BaseDistribution) -> str:
    """Write a distribution in Hydra's sweep syntax."""
    if isinstance(distribution, CategoricalDistribution):
        choices = ", ".join(map(str, distribution.choices))
        return f"choice({choices})"
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low = distribution.low
    high = distribution.high
    step = distribution.step
    is_int = isinstance(distribution, IntDistribution)
    has_every_value = step is None or (is_int and step == 1)
    if not has_every_value:
        return f"range({low}, …, {high}, step={step})"
    text = f"interval({low}, {high})"
    if is_int:
        text = f"int({text})"
    if distribution.log:
        text = f"tag(log, {text})"
    return text


def contains(distribution: IntDistribution | FloatDistribution, value: float) -> bool:
    """Whether a number lies in a numeric distribution, on a step where it has steps."""
    if not distribution.low <= value <= distribution.high:
        return False
    if isinstance(distribution, IntDistribution):
        return (value - distribution.low) % distribution.step == 0
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    return abs(steps - round(steps)) < STEP_TOLERANCE


def widen(name: str, distribution: BaseDistribution, value: Any) -> BaseDistribution:
    """Extend a distribution so that it contains a value.

    Args:
        name: the parameter, which errors name.
        distribution: the distribution to extend.
        value: an encoded value, see `encode`.

    Returns:
        The same distribution if it contains the value already, else a larger one of its kind.

    Raises:
        ConfigError: no distribution of the kind contains the value.
    """
    if isinstance(distribution, CategoricalDistribution):
        if _has_choice(distribution, value):
            return distribution
        return CategoricalDistribution([*distribution.choices, value])
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    described = describe(distribution)
    if not is_number(value):
        raise ConfigError(f"{name}={value}: no number, as {described} needs")
    if contains(distribution, float(value)):
        return distribution
    if isinstance(distribution, IntDistribution) and value != int(value):
        raise ConfigError(f"{name}={value}: no whole number, as {described} needs")
    # A logarithmic range ends above 0.
    if distribution.log and value <= 0:
        raise ConfigError(
            f"{name}={value}: can't be part of {described}; "
            "hydra.sweeper.baseline=false goes without"
        )
    return _widen_range(distribution, value)


def _has_choice(distribution: CategoricalDistribution, value: Any) -> bool:
    """Whether a value is among the choices; True and 1 are equal in Python, but not in a config."""
    is_bool = isinstance(value, bool)
    for choice in distribution.choices:
        if choice == value and isinstance(choice, bool) == is_bool:
            return True
    return False


def _widen_range(
    distribution: IntDistribution | FloatDistribution, value: float
) -> BaseDistribution:
    low = min(distribution.low, value)
    high = max(distribution.high, value)
    step = distribution.step
    if step is not None:
        # The value and all values of the old range must lie on the steps of the new one.
        step = _common_step(step, value - distribution.low)
    log = distribution.log
    if isinstance(distribution, IntDistribution):
        whole_step = int(step or 1)
        return IntDistribution(
            int(low),
            int(high),
            log=log,
            step=whole_step,
        )
    return FloatDistribution(
        low,
        high,
        log=log,
        step=step,
    )


def _common_step(step: float, offset: float) -> float:
    """Return the largest step that divides both a step and an offset from the range's start."""
    # By their decimal digits: as binary fractions, 0.1 and 0.05 have no useful common divisor.
    first = Fraction(str(step))
    second = Fraction(str(offset))
    denominator = first.denominator * second.denominator
    first_numerator = first.numerator * second.denominator
    second_numerator = second.numerator * first.denominator
    divisor = math.gcd(first_numerator, second_numerator)
    return float(Fraction(divisor, denominator))


def grid_values(distribution: BaseDistribution) -> list[Any] | None:
    """List a distribution's values as hydra-optuna-sweeper's grid does; None if continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return None
    values = list(FloatRange(distribution.low, distribution.high, distribution.step))
    # Hydra's range ends before the upper bound; Optuna's contains it.
    if not values or values[-1] != distribution.high:
        values.append(distribution.high)
    return values


def value_count(distribution: BaseDistribution) -> int | None:
    """Return the number of a distribution's values; None if it is continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if distribution.low == distribution.high:
        return 1
    if distribution.step is None:
        return None
    return round((distribution.high - distribution.low) / distribution.step) + 1


def random_value(distribution: BaseDistribution, draw: random.Random) -> Any:
    """Draw a value of a distribution that is not continuous, each with the same chance."""
    if isinstance(distribution, CategoricalDistribution):
        return draw.choice(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    count = value_count(distribution)
    assert count is not None
    value = distribution.low + draw.randrange(count) * (distribution.step or 0)
    return distribution.to_external_repr(value)


def suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> None:
    """Let a trial's sampler choose a parameter, unless an earlier attempt of the trial has."""
    if name in trial.params:
        return
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
        return
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    suggest_number: Callable[..., float] = trial.suggest_float
    if isinstance(distribution, IntDistribution):
        suggest_number = trial.suggest_int
    suggest_number(
        name,
        distribution.low,
        distribution.high,
        step=distribution.step,
        log=distribution.log,
    )
