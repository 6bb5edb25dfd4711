"""Compare two adapters by their losses on the same rows, with a paired bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


MAX_RESAMPLES = 10_000
"""Resamples where there are few rows: the interval's ends are stable to about 1 % of its width."""


MIN_RESAMPLES = 1_000
"""Resamples at least, however many rows there are."""


MAX_DRAWS = 10_000_000
"""Rows drawn for all resamples together: with many rows, fewer resamples are as precise."""


BLOCK = 200
"""Resamples that are in memory at the same time."""


@dataclass(frozen=True)
class Comparison:
    """Mean loss of the first side minus that of the second, in nats per token.

    A difference below 0 means that the first side is better.
    """

    difference: float
    low: float
    """Lower end of the 95 % confidence interval."""
    high: float
    """Upper end of the 95 % confidence interval."""
    chance: float
    """Share of resamples in which the first side is better; ties count half."""

    @property
    def verdict(self) -> str:
        """Describe the interval in words."""
        if self.high < 0:
            return "better"
        if self.low > 0:
            return "worse"
        return "no clear difference"


def compare(
    first: Sequence["Evaluation"],
    second: Sequence["Evaluation"],
    max_resamples: int = MAX_RESAMPLES,
) -> Comparison:
    """Compare two sides by the paired bootstrap (Efron and Tibshirani, 1993).

    Rows are resampled with replacement, and each row keeps its losses on both sides and with all
    seeds. Seeds are not resampled: with two of them, a bootstrap would hide half of their variance.
    Instead, the mean over several seeds gets an error with Student's t distribution. One seed says
    nothing about others, so its comparison holds for that seed alone.

    `scipy.stats.bootstrap` covers the case of one seed, but it draws other rows from the same
    generator, which would change the interval of every study that is concluded again, and it
    has no counterpart for several seeds.

    Args:
        first: one evaluation for each seed, on the same rows.
        second: evaluations on the same rows and with the same seeds, in the same order.
        max_resamples: resamples where memory allows so many.

    Returns:
        The difference with its confidence interval.
    """
    first_losses = np.array([evaluation.row_losses for evaluation in first])
    second_losses = np.array([evaluation.row_losses for evaluation in second])
    # [seeds, rows], nats summed over a row's tokens.
    differences = first_losses - second_losses
    tokens = np.array(first[0].row_tokens, dtype=float)
    # Over all tokens, not the mean of the rows' means: this is how a loss is computed.
    difference = differences.mean(0).sum() / max(tokens.sum(), 1)
    means = _resampled_means(differences, tokens, max_resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    share_better = (means < 0).mean()
    share_equal = (means == 0).mean()
    chance = share_better + share_equal / 2
    return Comparison(
        float(difference),
        float(low),
        float(high),
        float(chance),
    )


def _resampled_means(
    differences: np.ndarray, tokens: np.ndarray, max_resamples: int
) -> np.ndarray:
    """Compute the mean difference per token in each resample.

    A resample is a count for each row: how often the row is in it.

    Args:
        differences: loss differences `[seeds, rows]`.
        tokens: tokens of each row `[rows]`.
        max_resamples: upper bound of the number of resamples.

    Returns:
        Mean differences `[resamples]`.
    """
    seeds, rows = differences.shape
    # A fixed seed: the same losses give the same interval.
    generator = np.random.default_rng(0)
    # In whole blocks, which the loop fills one after the other.
    affordable = MAX_DRAWS // rows // BLOCK * BLOCK
    resamples = min(max_resamples, max(MIN_RESAMPLES, affordable))
    means = np.empty(resamples)
    equal_chances = np.full(rows, 1 / rows)
    for start in range(0, len(means), BLOCK):
        # Both [BLOCK, rows].
        row_counts = generator.multinomial(rows, equal_chances, size=BLOCK)
        seed_weights = _seed_weights(generator, seeds)
        row_differences = seed_weights @ differences
        sums = (row_differences * row_counts).sum(1)
        token_counts = np.maximum(row_counts @ tokens, 1)
        means[start : start + BLOCK] = sums / token_counts
    return means


def _seed_weights(generator: np.random.Generator, seeds: int) -> np.ndarray:
    """Draw weights of the seeds whose weighted mean has Student's t error: `[BLOCK, seeds]`."""
    weights = np.full((BLOCK, seeds), 1 / seeds)
    if seeds > 1:
        errors = generator.normal(size=(BLOCK, seeds))
        # Centred, so that the weights still add up to 1. Summed over the seeds' values, such errors
        # are normal with the variance (seeds - 1) s^2; divided by the root of seeds times chi^2,
        # they are s / sqrt(seeds) times Student's t with seeds - 1 degrees of freedom.
        errors -= errors.mean(1, keepdims=True)
        chi_squares = generator.chisquare(seeds - 1, size=(BLOCK, 1))
        weights += errors / np.sqrt(seeds * chi_squares)
    return weights
