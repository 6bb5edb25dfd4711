"""A config's own values of what a space searches: the baseline's point, and relative intervals."""

import dataclasses
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from finetune.config.convert import is_number
from finetune.config.override_text import NULL
from finetune.errors import refusal
from sweeps.space.encoding import encode
from sweeps.space.parameters import Variants
from sweeps.space.space import Point, Space


def scaled_space(space: Space, composed: DictConfig) -> Space:
    """Convert relative intervals to the units of their parameters.

    Args:
        space: the space.
        composed: the config of a trial before anything is searched, with the learning rate
            resolved.

    Raises:
        ConfigError: the config's own value of such a parameter is no number above 0.
    """
    distributions = dict(space.distributions)
    for name in space.relative:
        value = _positive_number(composed, name.lstrip("+"))
        multiples = distributions[name]
        assert isinstance(multiples, IntDistribution | FloatDistribution)
        low = _rounded(multiples.low * value)
        high = _rounded(multiples.high * value)
        distributions[name] = FloatDistribution(low, high, log=multiples.log)
    return dataclasses.replace(space, distributions=distributions, relative=frozenset())


def config_point(space: Space, composed: DictConfig) -> Point | None:
    """Return the values that a composed config has for what a space searches.

    Args:
        space: the space.
        composed: the config, with the `hydra` node.

    Returns:
        The point, with the values of the keys where no variant has them all; None if the
        config has no value for one of the parameters.
    """
    point: Point = {}
    for name, distribution in space.distributions.items():
        if not space.is_searched(name, point):
            continue
        if name in space.variants:
            values = _variant_of(name, space.variants[name], composed)
            if not values:
                return None
            point |= values
            continue
        value = _value_of(name, composed)
        if value == NULL and not _has_null(distribution):
            return None
        point[name] = value
    return point


def _value_of(name: str, composed: DictConfig) -> Any:
    """Return a config's own value of a key or a config group, encoded."""
    key = name.lstrip("+")
    group_choices = composed.hydra.runtime.choices
    # A searched config group has the name of its choice as its value.
    if key in group_choices:
        return encode(group_choices[key])
    return encode(OmegaConf.select(composed, key))


def _variant_of(name: str, variants: Variants, composed: DictConfig) -> Point:
    """Return the variant that a config has, or else the config's own values of all its keys."""
    config_values: Point = {}
    for variant, values in variants.items():
        for key in values:
            config_values[key] = _value_of(key, composed)
        if all(config_values[key] == value for key, value in values.items()):
            return {name: variant}
    # A key that the config lacks needs no override.
    return {key: value for key, value in config_values.items() if value != NULL}


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


def _rounded(bound: float) -> float:
    """Round to 12 significant digits, so that 0.1 times 0.002 is shown as 0.0002."""
    return float(f"{bound:.12g}")


def _has_null(distribution: BaseDistribution) -> bool:
    if not isinstance(distribution, CategoricalDistribution):
        return False
    return NULL in distribution.choices
