"""Search ranges of parameters: positions inside them, and values beyond their ends."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

End = Literal["lower", "upper"]


def newest_distributions(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Map each parameter to its newest range; a study may have been resumed with another one."""
    newest: dict[str, BaseDistribution] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        newest |= trial.distributions
    return newest


def is_ordered(distribution: CategoricalDistribution) -> bool:
    """Return whether the choices are numbers in rising order."""
    numbers: list[Any] = [choice for choice in distribution.choices if _is_number(choice)]
    return len(numbers) == len(distribution.choices) and numbers == sorted(numbers)


def _is_number(choice: Any) -> bool:
    return isinstance(choice, int | float) and not isinstance(choice, bool)


def position(distribution: BaseDistribution, value: Any) -> float | None:
    """Return the relative position of a value in its range.

    Returns:
        0 at the lower bound, 1 at the upper one, in between on the range's own scale. None if the
        range has no order or no width.
    """
    if isinstance(distribution, CategoricalDistribution):
        if not is_ordered(distribution):
            return None
        return distribution.choices.index(value) / max(len(distribution.choices) - 1, 1)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = float(distribution.low), float(distribution.high)
    number = float(value)
    if distribution.log:
        if number <= 0:
            return None  # from a trial before the range became logarithmic
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low) if high > low else None


def bounds(distribution: BaseDistribution) -> tuple[float, float]:
    """Return the lowest and the highest value of a range or of ordered choices."""
    if isinstance(distribution, CategoricalDistribution):
        first, last = distribution.choices[0], distribution.choices[-1]
        assert isinstance(first, int | float)
        assert isinstance(last, int | float)
        return first, last
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low, distribution.high


def value_beyond(distribution: BaseDistribution, end: End) -> float | None:
    """Propose a value outside a range, next to one of its ends.

    The distance is a factor of 2 for choices, a factor of 3 on a logarithmic scale, and half the
    range's width otherwise. Integers stay integers, and a range below 1 stays below 1, because such
    a parameter is a share.

    Returns:
        The value; None if no sensible one exists (below 0, or the integer 0, which would be a count
        of nothing).
    """
    low, high = bounds(distribution)
    bound = high if end == "upper" else low
    if isinstance(distribution, CategoricalDistribution):
        value = _scaled(bound, end, 2)
    elif getattr(distribution, "log", False):
        value = _scaled(bound, end, 3)
    else:
        value = _shifted(low, high, end)
    if isinstance(low, int):
        value = round(value)
        if value == 0:
            return None
    return None if value == bound else value


def _scaled(bound: float, end: End, factor: int) -> float:
    return bound * factor if end == "upper" else bound / factor


def _shifted(low: float, high: float, end: End) -> float:
    """Move a bound outwards by half the width, but not past 0 or 1 if the range ends there."""
    half = (high - low) / 2
    if end == "upper":
        return high + half if high >= 1 else min(high + half, (1 + high) / 2)
    return max(low - half, 0.0) if low >= 0 else low - half
