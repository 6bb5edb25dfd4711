"""Expected improvement of the next trial, by a Gaussian process on the trials so far."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from sweeps.answer.importance import MeasuredTrial, common_parameters
from sweeps.answer.ranges import parameter_columns

MAX_FITTED = 200
"""Largest number of trials that the process is fitted to; fitting takes cubic time."""


CANDIDATES = 2048
"""Points of the space at which the improvement is computed. Sobol sequences need a power of 2."""


@dataclass(frozen=True)
class Improvement:
    """Expected improvement of the next trial, in units of the objective."""

    gain: float
    spread: float
    """Difference between the third and the first quartile of the trials' values."""

    @property
    def relative(self) -> float:
        """The gain as a share of the spread."""
        return self.gain / self.spread


def expected_improvement(ranked: Sequence[MeasuredTrial]) -> Improvement | None:
    """Compute the largest expected improvement in the space (Jones et al., 1998).

    Improvement counts from the process's mean at the best trial, not from the best measured value,
    and without the noise that the process finds: a lucky measurement is no improvement.

    Args:
        ranked: trials with their costs (less is better), the best first.

    Returns:
        The improvement; None if the trials have no parameter in common.
    """
    ranked = ranked[:MAX_FITTED]
    trials = [trial for trial, _ in ranked]
    columns = [*parameter_columns(trials, common_parameters(trials)).values()]
    if not columns:
        return None
    costs = np.array([cost for _, cost in ranked])
    # Where all costs are equal, 1: the division must not fail.
    deviation = float(costs.std()) or 1.0
    standardized = (costs - costs.mean()) / deviation
    gain = _largest_gain(columns, standardized) * deviation
    # By quartiles, on which a few trials that learnt nothing have no influence.
    first_quartile, third_quartile = np.quantile(costs, [0.25, 0.75])
    spread = float(third_quartile - first_quartile) or 1.0
    return Improvement(gain, spread)


def _largest_gain(columns: Sequence[np.ndarray], costs: np.ndarray) -> float:
    """Fit the process to standardized costs and return the largest expected improvement."""
    points = np.concatenate(columns, axis=1)
    candidates = _candidate_points(columns)
    process = _process(points.shape[1])
    with warnings.catch_warnings():
        # A length scale at its bound is a parameter without influence.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, costs)
        incumbent = float(process.predict(points).min())
        mean, deviation = process.predict(candidates, return_std=True)
    # The deviation of the objective itself: that of a measurement contains the noise as well. The
    # fitted kernel is a sum, whose second term is the noise.
    noise = process.kernel_.k2.noise_level
    variance = np.maximum(deviation**2 - noise, 1e-12)
    deviation = np.sqrt(variance)
    gap = incumbent - mean
    standardized_gap = gap / deviation
    by_mean = gap * norm.cdf(standardized_gap)
    by_uncertainty = deviation * norm.pdf(standardized_gap)
    expected = by_mean + by_uncertainty
    return float(expected.max())


def _process(width: int) -> GaussianProcessRegressor:
    """Build a process with one length scale for each of `width` columns, and noise."""
    # Columns lie between 0 and 1 and costs are standardized, which gives the bounds their scale.
    length_scales = np.full(width, 2.0)
    smooth = Matern(length_scales, (0.2, 20.0), nu=2.5)
    amplitude = ConstantKernel(1.0, (1e-2, 1e2))
    noise = WhiteKernel(1.0, (1e-4, 1.0))
    return GaussianProcessRegressor(amplitude * smooth + noise, random_state=0)


def _candidate_points(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Spread candidates evenly over the space: `[CANDIDATES, columns]`."""
    # A fixed seed: the same trials give the same advice.
    sequence = qmc.Sobol(len(columns), seed=0)
    # [CANDIDATES, parameters], between 0 and 1.
    uniform = sequence.random(CANDIDATES)
    encoded = []
    for column, positions in zip(columns, uniform.T, strict=True):
        encoded.append(_encode_positions(positions, column))
    return np.concatenate(encoded, axis=1)


def _encode_positions(positions: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Encode uniform positions as a parameter's trials are: one column, or one-hot."""
    if columns.shape[1] == 1:
        return positions[:, None]
    # The one-hot rows of the choices that trials had; each gets an equal part of the positions.
    distinct: np.ndarray = np.unique(columns, axis=0)
    indices = (positions * len(distinct)).astype(int)
    encoded: np.ndarray = distinct[indices]
    return encoded
