"""A model of recorded curves: the curve of any point of the search space, with a seed's luck."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curves import Curve, by_config, read_curves, spread
from optuna.distributions import CategoricalDistribution
from study_variants import compose_study

from sweeps.answer.ranges import position
from sweeps.answer.surface_model import draw_objectives

RATE = "optimizer.learning_rate"

CLIPPED_FROM = 0.9
"""Values above this quantile count as if they were at it: rates that diverge are bad, and how bad
says nothing of the others."""

OFFSET = 0.5
"""The process models the logarithm of a value's distance to the evaluation's lowest one, in units
of the better half's width, plus this: beside the slope where rates begin to diverge, a process of
the values themselves would have an optimum below all recorded ones."""

RANDOM_POINTS = 4096
"""Points that stand for the whole space: for the best result, and the unit of regret."""


class CurveModel:
    """Curves between the recorded ones, by a Gaussian process over the points.

    All evaluations are interpolated with the same weights. The length scales and the noise are
    fitted to the results. A trial's curve has in addition the deviation of a recorded run, drawn at
    random, from the mean of its config's seeds: a whole curve, so that its values stay correlated.

    Args:
        path: the CSV of the recorded runs; its first config is the baseline.

    Raises:
        SystemExit: the runs differ in their evaluations, lack a parameter, or have one seed each.
    """

    def __init__(self, path: Path) -> None:
        curves = read_curves(path)
        self.steps = curves[0].steps
        complete = [curve for curve in curves if math.isfinite(curve.result)]
        if any(curve.steps != self.steps for curve in complete):
            raise SystemExit(
                f"{path}: the runs must have evaluations at the same steps"
            )
        if RATE not in curves[0].params:
            raise SystemExit(f"{path}: no column {RATE}")
        self.learning_rate = float(curves[0].params[RATE])
        """The baseline's."""
        self._distributions = compose_study([], self.learning_rate).space.distributions
        self.deviations = seed_deviations(path, curves)
        """Deviations of runs from the mean of their config's seeds `[runs, evaluations]`."""
        generator = np.random.default_rng(0)
        self.seed_error = float(self.deviations[:, -1].std())
        first_runs = [runs[0] for runs in by_config(curves).values()]
        self._points = np.array(
            [self._recorded_point(path, curve) for curve in first_runs]
        )
        self._fit(clipped_values(first_runs, self.steps), generator)
        random_points = self._random_points(generator)
        random_results = self.curves_at(random_points)[:, -1]
        recorded_results = self.curves_at(self._points)[:, -1]
        self.best = float(min(random_results.min(), recorded_results.min()))
        """The best result of the space, without a seed's luck."""
        self.unit = spread(random_results.tolist())
        """The unit of regret."""
        self.description = (
            f"{path.name}: {len(curves)} runs, {len(first_runs)} configs; unit {self.unit:.4f}; "
            f"error of a result left out {self.error:.4f}, seeds alone {self.seed_error:.4f}"
        )

    def _fit(self, values: np.ndarray, generator: np.random.Generator) -> None:
        self._lowest = values.min(axis=0)
        self._units = np.array([spread(column.tolist()) for column in values.T])
        logarithms = np.log((values - self._lowest) / self._units + OFFSET)
        results = logarithms[:, -1]
        standardized = (results - results.mean()) / results.std()
        draws = draw_objectives(self._points, standardized, 64, generator)
        self._scales = np.exp(
            np.mean([np.log(draw.length_scales) for draw in draws], axis=0)
        )
        noise = np.mean([np.log(draw.noise / draw.amplitude) for draw in draws])
        covariance = self._kernel(self._points)
        covariance += math.exp(2 * noise) * np.eye(len(values))
        inverse = np.linalg.inv(covariance)
        self._mean = logarithms.mean(axis=0)
        self._coefficients = inverse @ (logarithms - self._mean)
        left_out = logarithms - self._coefficients / np.diag(inverse)[:, None]
        errors = (self._restore(left_out) - values)[:, -1]
        better_half = results <= np.median(results)
        self.error = float(np.sqrt((errors[better_half] ** 2).mean()))
        """Root mean square error of the better half's results, each left out of the fit."""

    def _restore(self, logarithms: np.ndarray) -> np.ndarray:
        values: np.ndarray = self._lowest + self._units * (np.exp(logarithms) - OFFSET)
        return values

    def curves_at(self, points: np.ndarray) -> np.ndarray:
        """Return the curves of encoded points, without a seed's luck `[points, evaluations]`."""
        return self._restore(self._mean + self._kernel(points) @ self._coefficients)

    def _kernel(self, points: np.ndarray) -> np.ndarray:
        """Matérn 5/2 between points and the recorded ones."""
        differences = (points[:, None] - self._points[None]) / self._scales
        distances = np.sqrt(5 * (differences**2).sum(axis=-1))
        kernel: np.ndarray = (1 + distances + distances**2 / 3) * np.exp(-distances)
        return kernel

    def encode(self, point: Mapping[str, Any]) -> np.ndarray:
        """Return a point's positions in the ranges of its parameters, from 0 to 1."""
        positions = [
            position(distribution, point[name])
            for name, distribution in self._distributions.items()
        ]
        assert None not in positions, f"{point}: no position in the space"
        return np.array(positions, dtype=float)

    def _recorded_point(self, path: Path, curve: Curve) -> np.ndarray:
        point = {}
        for name, distribution in self._distributions.items():
            if name not in curve.params:
                raise SystemExit(f"{path}: no column {name}")
            point[name] = float(curve.params[name])
            # Recorded with few digits, a value at a range's end may lie beyond it.
            if isinstance(distribution, CategoricalDistribution):
                point[name] = next(
                    choice for choice in distribution.choices if choice == point[name]
                )
        return self.encode(point)

    def _random_points(self, generator: np.random.Generator) -> np.ndarray:
        points = generator.uniform(size=(RANDOM_POINTS, len(self._distributions)))
        for column, distribution in enumerate(self._distributions.values()):
            if isinstance(distribution, CategoricalDistribution):
                last = len(distribution.choices) - 1
                choices = generator.integers(0, last, RANDOM_POINTS, endpoint=True)
                points[:, column] = choices / max(last, 1)
        return points


def clipped_values(curves: Sequence[Curve], steps: Sequence[int]) -> np.ndarray:
    """Return the values of runs `[runs, evaluations]`, those of runs that diverge clipped."""
    rows = []
    for curve in curves:
        by_step = dict(zip(curve.steps, curve.values, strict=True))
        # A run that diverged lacks its later evaluations.
        rows.append([by_step.get(step, math.inf) for step in steps])
    values = np.nan_to_num(np.array(rows), nan=math.inf, posinf=math.inf)
    highest = np.quantile(values, CLIPPED_FROM, axis=0, method="lower")
    clipped: np.ndarray = np.minimum(values, highest)
    return clipped


def seed_deviations(path: Path, curves: Sequence[Curve]) -> np.ndarray:
    """Return how the runs of configs with several seeds deviate from their mean.

    Scaled so that their variance is that of a single run. Configs worse than the median are left
    out: where a rate nearly diverges, the luck of a seed is large, and no matter.
    """
    median = np.median([curve.result for curve in curves])
    deviations = []
    for runs in by_config(curves).values():
        mean = np.mean([curve.result for curve in runs])
        if len(runs) == 1 or mean > median:
            continue
        values = np.array([curve.values for curve in runs])
        scale = math.sqrt(len(runs) / (len(runs) - 1))
        deviations.extend((values - values.mean(axis=0)) * scale)
    if not deviations:
        raise SystemExit(f"{path}: no good config has several seeds")
    return np.array(deviations)
