"""Search ranges of parameters: positions inside them, and values beyond their ends."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from finetune.config.convert import is_number

End = Literal["lower", "upper"]


def newest_distributions(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Map each parameter to its newest range; a study may have been resumed with another one."""
    by_number = sorted(trials, key=lambda trial: trial.number)
    newest: dict[str, BaseDistribution] = {}
    # Later trials overwrite the ranges of earlier ones.
    for trial in by_number:
        newest |= trial.distributions
    return newest


def is_ordered(distribution: CategoricalDistribution) -> bool:
    """Return whether the choices are numbers in rising order."""
    choices: list[Any] = list(distribution.choices)
    if not all(is_number(choice) for choice in choices):
        return False
    return choices == sorted(choices)


def position(distribution: BaseDistribution, value: Any) -> float | None:
    """Return the relative position of a value in its range.

    Args:
        distribution: the range.
        value: a value of a trial, perhaps of one from before the range was changed.

    Returns:
        0 at the lower bound, 1 at the upper one, in between on the range's own scale. None if the
        range has no order or no width.
    """
    if isinstance(distribution, CategoricalDistribution):
        # A value from before the choices were changed need not be among them.
        if not is_ordered(distribution) or value not in distribution.choices:
            return None
        last_index = len(distribution.choices) - 1
        return distribution.choices.index(value) / max(last_index, 1)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    # A value from when the parameter had choices that were no numbers.
    if not is_number(value):
        return None
    low = float(distribution.low)
    high = float(distribution.high)
    number = float(value)
    if distribution.log:
        # A value from before the range became logarithmic.
        if number <= 0:
            return None
        low = math.log(low)
        high = math.log(high)
        number = math.log(number)
    if high <= low:
        return None
    return (number - low) / (high - low)


def parameter_columns(
    trials: Sequence[FrozenTrial], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Encode parameters that all trials have: `[trials, columns]` for each, between 0 and 1."""
    distributions = newest_distributions(trials)
    columns = {}
    for name in names:
        values = [trial.params[name] for trial in trials]
        columns[name] = _encode(distributions[name], values)
    return columns


def _encode(distribution: BaseDistribution, values: Sequence[Any]) -> np.ndarray:
    """Encode values as one column of positions, or one-hot if the parameter has no order."""
    positions = [position(distribution, value) for value in values]
    if None not in positions:
        return np.array(positions, dtype=float)[:, None]
    texts = [str(value) for value in values]
    choices = sorted(set(texts))
    rows = []
    for text in texts:
        one_hot = [float(text == choice) for choice in choices]
        rows.append(one_hot)
    return np.array(rows)


def bounds(distribution: BaseDistribution) -> tuple[float, float]:
    """Return the lowest and the highest value of a range or of ordered choices."""
    if isinstance(distribution, CategoricalDistribution):
        first = distribution.choices[0]
        last = distribution.choices[-1]
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

    Args:
        distribution: a range, or ordered choices.
        end: the end beyond which the value lies.

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
    if value == bound:
        return None
    return value


def _scaled(bound: float, end: End, factor: int) -> float:
    return bound * factor if end == "upper" else bound / factor


def _shifted(low: float, high: float, end: End) -> float:
    """Move a bound outwards by half the width, but not past 0 or 1 if the range ends there."""
    half_width = (high - low) / 2
    if end == "lower":
        extended = low - half_width
        return max(extended, 0.0) if low >= 0 else extended
    extended = high + half_width
    if high >= 1:
        return extended
    halfway_to_1 = (1 + high) / 2
    return min(extended, halfway_to_1)
