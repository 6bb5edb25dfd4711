"""Confidence intervals of a mean over rows: of a metric, or of a difference on the same rows.

A row's value is summed over its tokens, and the mean is one over all tokens: that is how a loss is
computed, so long rows count more.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
"""Share of intervals that contain the true difference."""


UPPER_QUANTILE = (1 + CONFIDENCE) / 2
"""The quantile above which half of `1 - CONFIDENCE` lies."""


MIN_EFFECTIVE_ROWS = 30
"""With fewer rows, by Kish's effective number, no interval is as sure as it says."""


MAX_RESAMPLES = 10_000
"""Resamples where there are few rows: the interval's ends are stable to about 1 % of its width."""


MIN_RESAMPLES = 1_000
"""Resamples at least, however many rows there are."""


MAX_DRAWS = 10_000_000
"""Rows drawn for all resamples together: with many rows, fewer resamples are as precise."""


BLOCK = 200
"""Resamples that are in memory at the same time."""


@dataclass(frozen=True)
class RowMean:
    """The mean difference per token on a set of rows."""

    value: float
    standard_error: float
    effective_rows: float
    """Kish's effective number of rows: as many rows of one length would be as precise."""

    @property
    def is_measurable(self) -> bool:
        """Whether there are rows enough for an interval."""
        return self.effective_rows >= MIN_EFFECTIVE_ROWS


def row_mean(differences: np.ndarray, tokens: np.ndarray) -> RowMean:
    """Compute the mean difference per token, and its standard error as that of a ratio of sums.

    Args:
        differences: each row's difference, summed over its tokens `[rows]`.
        tokens: tokens of each row `[rows]`.
    """
    rows = len(tokens)
    total = max(float(tokens.sum()), 1.0)
    value = float(differences.sum()) / total
    # The ratio's first-order expansion (Cochran, Sampling Techniques, 1977, chapter 6).
    residuals = differences - value * tokens
    variance = rows / max(rows - 1, 1) * float((residuals**2).sum()) / total**2
    effective_rows = total**2 / max(float((tokens**2).sum()), 1.0)
    return RowMean(value, math.sqrt(variance), effective_rows)


def row_interval(
    differences: np.ndarray, tokens: np.ndarray, max_resamples: int = MAX_RESAMPLES
) -> tuple[float, float]:
    """Compute the confidence interval of the mean difference per token over rows.

    Each end is the farther one of two. The studentised bootstrap (Efron and Tibshirani, 1993,
    chapter 12) accounts for skewed differences, but its interval is too short for heavy tails;
    Student's t distribution is the reverse. With both, 93 to 97 % of the intervals contain the
    truth from 57 rows on.

    Args:
        differences: each row's difference, summed over its tokens `[rows]`.
        tokens: tokens of each row `[rows]`.
        max_resamples: resamples where memory allows so many.

    Returns:
        The lower and the upper end.
    """
    mean = row_mean(differences, tokens)
    t = float(stats.t.ppf(UPPER_QUANTILE, mean.effective_rows - 1))
    ratios = _resampled_t(differences, tokens, mean, max_resamples)
    low, high = np.quantile(ratios, [1 - UPPER_QUANTILE, UPPER_QUANTILE])
    lower = mean.value - max(float(high), t) * mean.standard_error
    upper = mean.value + max(float(-low), t) * mean.standard_error
    return lower, upper


def _resampled_t(
    differences: np.ndarray, tokens: np.ndarray, mean: RowMean, max_resamples: int
) -> np.ndarray:
    """Compute, in each resample of the rows, the mean's distance to `mean` in standard errors.

    A resample is a count for each row: how often the row is in it.

    Returns:
        The ratios `[resamples]`; 0 where a resample has no variation.
    """
    rows = len(tokens)
    # A fixed seed: the same losses give the same interval.
    generator = np.random.default_rng(0)
    # In whole blocks, which the loop fills one after the other.
    affordable = MAX_DRAWS // rows // BLOCK * BLOCK
    resamples = min(max_resamples, max(MIN_RESAMPLES, affordable))
    equal_chances = np.full(rows, 1 / rows)
    blocks = []
    for _ in range(0, resamples, BLOCK):
        # [BLOCK, rows].
        counts = generator.multinomial(rows, equal_chances, size=BLOCK)
        totals = np.maximum(counts @ tokens, 1)
        means = counts @ differences / totals
        # The sum of squared residuals, multiplied out so that no array of residuals is needed.
        squares = (
            counts @ differences**2
            - 2 * means * (counts @ (differences * tokens))
            + means**2 * (counts @ tokens**2)
        )
        variances = rows / (rows - 1) * np.maximum(squares, 0) / totals**2
        errors = np.sqrt(variances)
        distances = means - mean.value
        ratios = np.zeros(BLOCK)
        np.divide(distances, errors, out=ratios, where=errors > 0)
        blocks.append(ratios)
    return np.concatenate(blocks)
