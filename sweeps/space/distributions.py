"""Optuna's distributions: read from Hydra's sweep syntax, described, listed, suggested."""

import random
from collections.abc import Callable, Sequence
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


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether an encoded value lies in a distribution, on a step where it has steps."""
    if isinstance(distribution, CategoricalDistribution):
        return has_choice(distribution.choices, value)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if not is_number(value) or not distribution.low <= value <= distribution.high:
        return False
    if isinstance(distribution, IntDistribution):
        return bool((value - distribution.low) % distribution.step == 0)
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    return bool(abs(steps - round(steps)) < STEP_TOLERANCE)


def has_choice(choices: Sequence[Any], value: Any) -> bool:
    """Whether a value is among choices; True and 1 are equal in Python, but not in a config."""
    is_bool = isinstance(value, bool)
    return any(
        choice == value and isinstance(choice, bool) == is_bool for choice in choices
    )


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
