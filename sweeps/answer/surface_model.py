"""Objectives that could have given a study's trials: draws from a Gaussian process's posterior."""

from dataclasses import dataclass

import numpy as np

LENGTH_SCALE = (1.5, 0.8)
"""Prior of a column's length scale: its median, and the standard deviation of its logarithm.
Columns lie between 0 and 1."""


AMPLITUDE = (0.8, 0.5)
"""Prior of the process's standard deviation, of standardized costs."""


NOISE = (0.5, 0.8)
"""Prior of the standard deviation of a measurement's noise, of standardized costs."""


SETTINGS = 384
"""Settings of the process that are tried, in each of two rounds."""


FEATURES = 192
"""Cosines that a draw from the prior is the sum of (Rahimi and Recht, 2007)."""


JITTER = 1e-6
"""Added to the noise's variance, for matrices that can be factorized."""


DEGREES_OF_FREEDOM = 5
"""Those of the frequencies of the Matérn 5/2 kernel, which have Student's distribution."""


@dataclass(frozen=True)
class ObjectiveDraw:
    """One objective that could have given the trials' costs, with its noise."""

    points: np.ndarray
    length_scales: np.ndarray
    amplitude: float
    noise: float
    """Standard deviation of a measurement."""
    frequencies: np.ndarray
    phases: np.ndarray
    coefficients: np.ndarray
    constant: float
    corrections: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the objective's values, without noise, at points `[points, columns]`.

        A draw from the prior is corrected at the trials (Matheron's rule).
        """
        prior = _prior(
            points, self.frequencies, self.phases, self.coefficients, self.constant
        )
        scales = self.length_scales[None]
        covariance = _kernel(points, self.points, scales)[0] * self.amplitude**2 + 1.0
        values: np.ndarray = prior + covariance @ self.corrections
        return values


def draw_objectives(
    points: np.ndarray, costs: np.ndarray, count: int, generator: np.random.Generator
) -> list[ObjectiveDraw]:
    """Draw objectives from the posterior of a Gaussian process, its settings included.

    Args:
        points: the trials' encoded parameters `[trials, columns]`, between 0 and 1.
        costs: the trials' standardized costs.
        count: number of draws.
        generator: source of random numbers.

    Returns:
        The draws.
    """
    draws = []
    for setting in _draw_settings(points, costs, count, generator):
        draws.append(_draw_objective(points, costs, setting, generator))
    return draws


def _draw_settings(
    points: np.ndarray, costs: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw logarithms of length scales, amplitude and noise from their posterior.

    By importance sampling: a first round from the prior, a second one from a normal distribution
    around the likely settings of the first.

    Returns:
        `[count, columns + 2]`.
    """
    priors = [LENGTH_SCALE] * points.shape[1] + [AMPLITUDE, NOISE]
    center = np.log([median for median, _ in priors])
    width = np.array([deviation for _, deviation in priors])
    shape = (SETTINGS, len(priors))
    first = generator.normal(center, width, shape)
    first_weights = _log_likelihoods(points, costs, first)
    # The square root, so that a few settings do not decide where the second round looks.
    softened = _normalize(first_weights / 2)
    second_center = softened @ first
    variance = softened @ (first - second_center) ** 2
    second_width = np.sqrt(variance) + 0.15
    second = generator.normal(second_center, second_width, shape)
    second_weights = (
        _log_likelihoods(points, costs, second)
        + _log_density(second, center, width)
        - _log_density(second, second_center, second_width)
    )
    settings = np.concatenate([first, second])
    weights = _normalize(np.concatenate([first_weights, second_weights]))
    return settings[generator.choice(len(settings), count, p=weights)]


def _normalize(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    normalized: np.ndarray = weights / weights.sum()
    return normalized


def _log_density(
    values: np.ndarray, center: np.ndarray, width: np.ndarray
) -> np.ndarray:
    standardized = (values - center) / width
    density: np.ndarray = -0.5 * (standardized**2).sum(axis=1) - np.log(width).sum()
    return density


def _log_likelihoods(
    points: np.ndarray, costs: np.ndarray, settings: np.ndarray
) -> np.ndarray:
    """Compute the log likelihood of the costs under each setting."""
    count = len(costs)
    # In blocks of about 32 MB.
    blocks = max(1, len(settings) * count**2 // 2_000_000)
    likelihoods = []
    for block in np.array_split(settings, blocks):
        covariances = _covariances(points, np.exp(block))
        factors = np.linalg.cholesky(covariances)
        columns = np.broadcast_to(costs[:, None], (len(block), count, 1))
        residuals = np.linalg.solve(factors, columns)[..., 0]
        diagonals = np.diagonal(factors, axis1=1, axis2=2)
        squares = (residuals**2).sum(axis=1)
        likelihoods.append(-0.5 * squares - np.log(diagonals).sum(axis=1))
    return np.concatenate(likelihoods)


def _covariances(points: np.ndarray, settings: np.ndarray) -> np.ndarray:
    """Compute the covariances of the trials' costs `[settings, trials, trials]`.

    The constant 1 stands for an unknown mean.
    """
    scales = settings[:, :-2]
    variances = settings[:, -2, None, None] ** 2
    noise = settings[:, -1, None, None] ** 2 + JITTER
    smooth = variances * _kernel(points, points, scales)
    covariances: np.ndarray = smooth + 1.0 + noise * np.eye(len(points))
    return covariances


def _kernel(first: np.ndarray, second: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Compute the Matérn 5/2 kernel of all pairs of points, for each row of length scales."""
    first = first[None] / scales[:, None]
    second = second[None] / scales[:, None]
    first_squares = (first**2).sum(axis=-1)[:, :, None]
    second_squares = (second**2).sum(axis=-1)[:, None, :]
    products = first @ second.transpose(0, 2, 1)
    squared_distances = np.maximum(first_squares + second_squares - 2 * products, 0)
    distances = np.sqrt(5 * squared_distances)
    kernel: np.ndarray = (1 + distances + distances**2 / 3) * np.exp(-distances)
    return kernel


def _draw_objective(
    points: np.ndarray,
    costs: np.ndarray,
    setting: np.ndarray,
    generator: np.random.Generator,
) -> ObjectiveDraw:
    """Draw an objective from the posterior of the process with one setting."""
    scales = np.exp(setting[:-2])
    amplitude, noise = np.exp(setting[-2:])
    normal = generator.normal(size=(FEATURES, points.shape[1]))
    chi_square = generator.chisquare(DEGREES_OF_FREEDOM, (FEATURES, 1))
    frequencies = normal / np.sqrt(chi_square / DEGREES_OF_FREEDOM) / scales
    phases = generator.uniform(0, 2 * np.pi, FEATURES)
    coefficients = generator.normal(size=FEATURES) * amplitude * np.sqrt(2 / FEATURES)
    constant = float(generator.normal())
    prior = _prior(points, frequencies, phases, coefficients, constant)
    errors = costs - prior - noise * generator.normal(size=len(costs))
    covariance = _covariances(points, np.exp(setting)[None])[0]
    return ObjectiveDraw(
        points,
        scales,
        float(amplitude),
        float(noise),
        frequencies,
        phases,
        coefficients,
        constant,
        corrections=np.linalg.solve(covariance, errors),
    )


def _prior(
    points: np.ndarray,
    frequencies: np.ndarray,
    phases: np.ndarray,
    coefficients: np.ndarray,
    constant: float,
) -> np.ndarray:
    values: np.ndarray = np.cos(points @ frequencies.T + phases) @ coefficients
    return values + constant
