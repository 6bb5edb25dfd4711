"""Points of a space: all of them, their number, random ones, and those at its ends."""

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from finetune.errors import ConfigError
from sweeps.space.distributions import grid_values, random_value, value_count
from sweeps.space.space import Point, Space


def point_count(space: Space) -> int | None:
    """Return the number of a space's points; None: a parameter is continuous."""
    counts = {}
    for name, distribution in space.distributions.items():
        count = value_count(distribution)
        if count is None:
            return None
        counts[name] = count
    named = {name for condition in space.conditions.values() for name in condition}
    values = {name: grid_values(space.distributions[name]) or [] for name in named}
    total = 0
    # Each combination of the values that conditions are on, with all values of the others.
    for combination in itertools.product(*values.values()):
        point = dict(zip(values, combination, strict=True))
        searched = space.searched_part(point)
        # A parameter that is not searched here has no values: counted once, by its first.
        if any(
            point[name] != values[name][0] for name in point.keys() - searched.keys()
        ):
            continue
        others = [
            counts[name]
            for name in counts.keys() - named
            if space.is_searched(name, searched)
        ]
        total += math.prod(others)
    return total


def may_repeat(space: Space) -> bool:
    """Whether trials may have the same point: no continuous parameter is searched in all of them.

    Where no condition of a continuous parameter is met, a point is one of a few.
    """
    return all(
        value_count(distribution) is not None or name in space.conditions
        for name, distribution in space.distributions.items()
    )


def random_point(
    space: Space,
    draw: random.Random,
    fixed: Mapping[str, Any] | None = None,
    draw_continuous: Callable[[str], Any] | None = None,
) -> Point:
    """Draw a point of a space.

    Args:
        space: the space.
        draw: draws each value of a parameter that is not continuous with the same chance.
        fixed: values of some parameters that the point shall have.
        draw_continuous: draws the value of a continuous parameter; None: there is none.
    """
    point: Point = {}
    for name, distribution in space.distributions.items():
        if not space.is_searched(name, point):
            continue
        if fixed is not None and name in fixed:
            point[name] = fixed[name]
        elif draw_continuous is not None and value_count(distribution) is None:
            point[name] = draw_continuous(name)
        else:
            point[name] = random_value(distribution, draw)
    return point


def grid_points(space: Space, seed: int) -> list[Point]:
    """Return every point of a space of choices and steps, in an order shuffled by a seed.

    Args:
        space: the space.
        seed: the run's seed, so that a resumed study has the same order.

    Raises:
        ConfigError: a parameter is continuous.
    """
    values: list[list[Any]] = []
    continuous = []
    for name, distribution in space.distributions.items():
        choices = grid_values(distribution)
        if choices is None:
            continuous.append(name)
        else:
            values.append(choices)
    if continuous:
        names = ", ".join(continuous)
        raise ConfigError(f"{names}: a grid needs a choice or a range with a step")
    points: dict[str, Point] = {}
    for combination in itertools.product(*values):
        whole = dict(zip(space.distributions, combination, strict=True))
        point = space.searched_part(whole)
        # Combinations that differ only in what is not searched there are one point.
        points.setdefault(repr(point), point)
    shuffled = list(points.values())
    # Shuffled, so that a study which is stopped early has seen all regions of the grid.
    random.Random(seed).shuffle(shuffled)
    return shuffled


def extreme_points(space: Space) -> list[Point]:
    """Return a few points that together have every choice and both ends of every range."""
    values: dict[str, list[Any]] = {}
    for name, distribution in space.distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            values[name] = list(distribution.choices)
        else:
            assert isinstance(distribution, IntDistribution | FloatDistribution)
            values[name] = [distribution.low, distribution.high]
    lengths = [len(extremes) for extremes in values.values()]
    points = []
    for index in range(max(lengths, default=0)):
        point: Point = {}
        for name, extremes in values.items():
            # A parameter with fewer extremes than another begins again with its first.
            point[name] = extremes[index % len(extremes)]
        points.append(space.searched_part(point))
    for name in space.conditions:
        for extreme in values[name]:
            point = {key: extremes[0] for key, extremes in values.items()}
            point |= _met(space, name) | {name: extreme}
            points.append(space.searched_part(point))
    return points


def _met(space: Space, name: str) -> Point:
    """Return values of other parameters with which a parameter is searched."""
    point: Point = {}
    for key, allowed in space.conditions.get(name, {}).items():
        point |= _met(space, key) | {key: allowed[0]}
    return point
