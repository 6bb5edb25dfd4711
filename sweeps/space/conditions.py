"""Conditions: parameters that are searched only where others have certain values."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from finetune.errors import ConfigError
from sweeps.space.distributions import contains, describe, grid_values, has_choice
from sweeps.space.parameters import Condition

Conditions = Mapping[str, Condition]
"""The condition of each parameter that has one."""


def is_met(condition: Condition, point: Mapping[str, Any]) -> bool:
    """Whether a point has the values that a condition asks for."""
    for key, allowed in condition.items():
        if key not in point or not has_choice(allowed, point[key]):
            return False
    return True


def in_order(names: Sequence[str], conditions: Conditions) -> list[str]:
    """Order parameters so that each comes after those that its condition names.

    Raises:
        ConfigError: conditions depend on each other.
    """
    ordered: list[str] = []
    waiting = list(names)
    while waiting:
        ready = [
            name for name in waiting if set(conditions.get(name, ())) <= set(ordered)
        ]
        if not ready:
            raise ConfigError(
                f"{', '.join(waiting)}: their conditions depend on each other"
            )
        ordered += ready
        waiting = [name for name in waiting if name not in ready]
    return ordered


def require_conditions(
    conditions: Conditions, distributions: Mapping[str, BaseDistribution]
) -> None:
    """Refuse conditions that no trial can meet, or that are on what is not searched.

    Raises:
        ConfigError: names the first of them.
    """
    for name, condition in conditions.items():
        for key, allowed in condition.items():
            if key not in distributions:
                others = ", ".join(other for other in distributions if other != name)
                raise ConfigError(
                    f"{name}: when {key}: is not searched; allowed: {others}"
                )
            distribution = distributions[key]
            if grid_values(distribution) is None:
                raise ConfigError(
                    f"{name}: when {key}: needs choices, not {describe(distribution)}"
                )
            for value in allowed:
                if not contains(distribution, value):
                    described = describe(distribution)
                    raise ConfigError(
                        f"{name}: when {key}={value}: lies outside {described}"
                    )
