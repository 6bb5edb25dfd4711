"""Whether one adapter is truly better than another: their losses on the same rows, drawn anew many times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


MOST_RESAMPLES, LEAST_RESAMPLES = 10_000, 1_000


DRAWS = 10_000_000
"""Of rows, for all resamples together: of many rows fewer resamples say as much."""


AT_ONCE = 200
"""Resamples that are in memory together."""


@dataclass(frozen=True)
class Comparison:
    """One side's mean loss of a token minus the other's, in nats: below 0 the one is better."""

    difference: float
    low: float
    """The 95 % confidence interval's ends."""
    high: float
    chance: float
    """Share of resamples in which the one is better; of equals half."""

    @property
    def verdict(self) -> str:
        """The interval in words."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no clear difference"


def compare(one: Sequence["Evaluation"], other: Sequence["Evaluation"]) -> Comparison:
    """Two sides, each measured on the same rows once for each seed, compared by the paired bootstrap.

    Rows are drawn anew with replacement; what a row and a seed gave on both sides stays together (Efron and
    Tibshirani, 1993). Seeds are far too few for that: two of them drawn anew would hide half of how much they differ.
    Where there are several, their mean is off by Student's t; one says nothing of others.
    """
    differences = np.array([side.row_losses for side in one]) - np.array([side.row_losses for side in other])
    tokens = np.array(one[0].row_tokens, dtype=float)
    seeds, rows = differences.shape
    draw = np.random.default_rng(0)
    means = np.empty(min(MOST_RESAMPLES, max(LEAST_RESAMPLES, DRAWS // rows // AT_ONCE * AT_ONCE)))
    for start in range(0, len(means), AT_ONCE):
        of_rows = draw.multinomial(rows, np.full(rows, 1 / rows), size=AT_ONCE)
        of_seeds = np.full((AT_ONCE, seeds), 1 / seeds)
        if seeds > 1:
            off = draw.normal(size=(AT_ONCE, seeds))
            off -= off.mean(1, keepdims=True)
            of_seeds += off / np.sqrt(seeds * draw.chisquare(seeds - 1, size=(AT_ONCE, 1)))
        sums = (of_seeds @ differences * of_rows).sum(1)
        means[start : start + AT_ONCE] = sums / np.maximum(of_rows @ tokens, 1)
    low, high = np.quantile(means, [0.025, 0.975])
    chance = float((means < 0).mean() + (means == 0).mean() / 2)
    return Comparison(float(differences.mean(0).sum() / max(tokens.sum(), 1)), float(low), float(high), chance)
