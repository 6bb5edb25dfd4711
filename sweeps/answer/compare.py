"""Compare two adapters by their losses on the same rows, with a paired bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


MAX_RESAMPLES = 10_000


MIN_RESAMPLES = 1_000


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
    differences = first_losses - second_losses  # [seeds, rows], nats summed over a row's tokens
    tokens = np.array(first[0].row_tokens, dtype=float)
    means = _resampled_means(differences, tokens, max_resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    chance = float((means < 0).mean() + (means == 0).mean() / 2)
    difference = differences.mean(0).sum() / max(tokens.sum(), 1)
    return Comparison(float(difference), float(low), float(high), chance)


def _resampled_means(differences: np.ndarray, tokens: np.ndarray, max_resamples: int) -> np.ndarray:
    """Compute the mean difference per token in each resample.

    Args:
        differences: loss differences `[seeds, rows]`.
        tokens: tokens of each row `[rows]`.
        max_resamples: upper bound of the number of resamples.

    Returns:
        Mean differences `[resamples]`.
    """
    seeds, rows = differences.shape
    generator = np.random.default_rng(0)
    affordable = MAX_DRAWS // rows // BLOCK * BLOCK
    means = np.empty(min(max_resamples, max(MIN_RESAMPLES, affordable)))
    for start in range(0, len(means), BLOCK):
        row_counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=BLOCK)
        seed_weights = _seed_weights(generator, seeds)
        sums = (seed_weights @ differences * row_counts).sum(1)
        means[start : start + BLOCK] = sums / np.maximum(row_counts @ tokens, 1)
    return means


def _seed_weights(generator: np.random.Generator, seeds: int) -> np.ndarray:
    """Draw weights of the seeds whose weighted mean has Student's t error: `[BLOCK, seeds]`."""
    weights = np.full((BLOCK, seeds), 1 / seeds)
    if seeds > 1:
        errors = generator.normal(size=(BLOCK, seeds))
        errors -= errors.mean(1, keepdims=True)
        weights += errors / np.sqrt(seeds * generator.chisquare(seeds - 1, size=(BLOCK, 1)))
    return weights
