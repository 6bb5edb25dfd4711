"""Confidence intervals of a mean difference from rows and seeds."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from finetune.metrics.row_interval import UPPER_QUANTILE, RowMean

SELECTION_DRAWS = 200_000
"""Simulated studies by which a winner's luck is found: its quantile is exact to about 1 %."""


@dataclass(frozen=True)
class SeedMean:
    """A mean over several seeds, and how far one seed's value lies from it."""

    value: float
    variance: float
    """Of one seed's value; each further seed divides that of the mean."""
    seeds: int

    @property
    def mean_variance(self) -> float:
        """Variance of the mean."""
        return self.variance / self.seeds


def seed_mean(values: np.ndarray) -> SeedMean:
    """Compute the mean and the variance of the values of at least two seeds."""
    return SeedMean(float(np.mean(values)), float(np.var(values, ddof=1)), len(values))


def combined_error(rows: RowMean, seeds: SeedMean) -> tuple[float, float]:
    """Combine the error by the choice of rows with that by the choice of seeds.

    Args:
        rows: the difference's mean on the rows.
        seeds: the difference's mean over the seeds.

    Returns:
        The standard error, and its degrees of freedom by Satterthwaite (1946): of two variances of
        which one is known far better, most of that one's. With two seeds, a single one:
        their variance is often far too small by chance.
    """
    row_variance = rows.standard_error**2
    variance = row_variance + seeds.mean_variance
    if variance == 0:
        return 0.0, math.inf
    if seeds.seeds == 2:
        return math.sqrt(variance), 1.0
    spread = row_variance**2 / (rows.effective_rows - 1)
    spread += seeds.mean_variance**2 / (seeds.seeds - 1)
    return math.sqrt(variance), variance**2 / spread


def combined_half_width(rows: RowMean, seeds: SeedMean) -> float:
    """Compute half the width of the confidence interval by rows and seeds.

    By Student's t distribution with Satterthwaite's degrees of freedom. With two seeds, of which it
    would hold the truth in 88 % only, by the method of variance estimates recovery (Zou and Donner,
    2008), which holds it in 95 to 99 %.

    Args:
        rows: the difference's mean on the rows.
        seeds: the difference's mean over the seeds.
    """
    if seeds.seeds > 2:
        error, freedom = combined_error(rows, seeds)
        return float(stats.t.ppf(UPPER_QUANTILE, freedom)) * error
    of_rows = (
        float(stats.t.ppf(UPPER_QUANTILE, rows.effective_rows - 1))
        * rows.standard_error
    )
    of_seeds = float(stats.t.ppf(UPPER_QUANTILE, 1)) * math.sqrt(seeds.mean_variance)
    return math.hypot(of_rows, of_seeds)


@functools.lru_cache
def selected_quantile(candidates: int, controls: int) -> float:
    """Compute how far a winner by luck alone lies from its control, in standard errors.

    All candidates and the control are equal. Each candidate has been trained with one seed, and the
    best of them is compared with the mean of the control's seeds: Dunnett's comparison of many
    treatments with a control (1955), whose variance the control's seeds have shown.

    Args:
        candidates: number of candidates of which the best is taken.
        controls: number of seeds of the control, at least two.

    Returns:
        The quantile `UPPER_QUANTILE` of that distance.
    """
    generator = np.random.default_rng(0)
    # The largest of n normal numbers, from the n-th root of a uniform one.
    uniform = generator.random(SELECTION_DRAWS) ** (1 / candidates)
    luck = stats.norm.ppf(uniform)
    control = generator.normal(size=SELECTION_DRAWS) / math.sqrt(controls)
    variances = generator.chisquare(controls - 1, size=SELECTION_DRAWS) / (controls - 1)
    errors = np.sqrt(variances * (1 + 1 / controls))
    return float(np.quantile((luck + control) / errors, UPPER_QUANTILE))
