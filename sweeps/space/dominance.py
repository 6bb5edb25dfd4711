"""Ranks of trials with several objectives, by non-dominated sorting (NSGA-II, Deb et al. 2002)."""

import numpy as np


def count_ahead(costs: np.ndarray, others: np.ndarray) -> int:
    """Return how many others are in better fronts than a trial.

    The first front are those that no other dominates; the next one those that only the first
    dominates, and so on. One trial dominates another that is nowhere better and somewhere worse.
    With one objective a front is a value, and these are the others that are better.

    Args:
        costs: the trial's objectives `[objectives]`, less is better.
        others: those of the others `[trials, objectives]`.
    """
    if len(costs) == 1:
        return int((others[:, 0] < costs[0]).sum())
    ahead = 0
    remaining = others
    # Without the others in better fronts, nothing dominates the trial.
    while _dominates(remaining, costs[None]).any():
        is_dominated = _dominates(remaining, remaining).any(axis=0)
        ahead += int((~is_dominated).sum())
        remaining = remaining[is_dominated]
    return ahead


def _dominates(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether each of the first dominates each of the second `[first, second]`."""
    nowhere_worse = (first[:, None] <= second[None]).all(axis=2)
    somewhere_better = (first[:, None] < second[None]).any(axis=2)
    return np.logical_and(nowhere_worse, somewhere_better)
