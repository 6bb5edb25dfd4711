"""No point of a space is trained twice: which points are tried, and a sampler that avoids them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from sweeps.compat import enqueued_point
from sweeps.space.points import random_point
from sweeps.space.space import Point, Space
from sweeps.study.inside import point_of
from sweeps.study.study import OUT_OF_TIME
from sweeps.study.wrapped_sampler import WrappedSampler

ATTEMPTS = 1000
"""Draws of an untried point that holds the values which a user has given for a trial."""


def tried_points(trials: Sequence[FrozenTrial]) -> list[Point]:
    """Return the points that trials have or wait for.

    A trial that ran out of time has not shown what its point is worth.
    """
    points = []
    for trial in trials:
        if trial.user_attrs.get("reason") == OUT_OF_TIME:
            continue
        enqueued = enqueued_point(trial)
        if enqueued is not None:
            points.append(enqueued)
        # A point that its user gave in part is whole once the sampler has chosen the rest.
        if trial.params:
            points.append(point_of(trial))
    return points


def is_among(point: Point, points: Sequence[Point]) -> bool:
    """Whether a point is one of several, as far as floats of 12 digits tell."""
    wanted = _rounded(point)
    return any(_rounded(other) == wanted for other in points)


def _rounded(point: Point) -> Point:
    rounded = {}
    for name, value in point.items():
        # Of a range with steps, 0.1 + 2 * 0.1 and 0.3 are one value.
        rounded[name] = float(f"{value:.12g}") if isinstance(value, float) else value
    return rounded


class UntriedPointSampler(WrappedSampler):
    """Suggests what another sampler suggests, or an untried point where that is tried.

    The values of that point are random, but those of continuous parameters the other sampler's.

    Args:
        sampler: the other sampler.
        space: a space whose trials may have the same point, see `may_repeat`.
        seed: seed of the random values.
    """

    def __init__(self, sampler: BaseSampler, space: Space, seed: int) -> None:
        super().__init__(sampler)
        self._space = space
        self._random = random.Random(seed)
        self._relative: Mapping[str, Any] = {}
        self._point: Point | None = None

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Draw those parameters; they are suggested one by one, with the rest of the point."""
        self._relative = self._sampler.sample_relative(study, trial, search_space)
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a parameter of the trial's point, which is drawn at the first call."""
        if self._point is None:
            self._point = self._draw(study, trial)
        return self._point[param_name]

    def _draw(self, study: optuna.Study, trial: FrozenTrial) -> Point:
        # A trial whose worker was lost while it drew its point has a part of it.
        fixed = {**(enqueued_point(trial) or {}), **trial.params}

        def suggested(name: str) -> Any:
            if name in self._relative:
                return self._relative[name]
            distribution = self._space.distributions[name]
            return self._sampler.sample_independent(study, trial, name, distribution)

        point: Point = dict(fixed)
        for name in self._space.distributions:
            if name in fixed or not self._space.is_searched(name, point):
                continue
            point[name] = suggested(name)
        trials = study.get_trials(deepcopy=False)
        others = [other for other in trials if other.number != trial.number]
        tried = tried_points(others)
        point = self._space.searched_part(point)
        if not is_among(point, tried):
            return point
        for _ in range(ATTEMPTS):
            drawn = random_point(self._space, self._random, fixed, suggested)
            if not is_among(drawn, tried):
                return drawn
        # Every point that holds the user's values is tried: those values are trained again.
        return point
