"""Compare two adapters, or the configs behind them, by a metric on the same rows.

Two adapters differ on these rows by what other rows could show otherwise. Two configs differ by
that, and by the seeds with which they were trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from sweeps.answer.intervals import (
    MAX_RESAMPLES,
    UPPER_QUANTILE,
    combined_error,
    combined_half_width,
    row_interval,
    row_mean,
    seed_mean,
    selected_quantile,
)

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation

Metric = Literal["loss", "accuracy"]


def metric_of(objective: str) -> Metric:
    """Return the metric by which an objective is compared on the test rows.

    Args:
        objective: the name of the study's objective, for example `eval/accuracy`.
    """
    return "accuracy" if objective.endswith("/accuracy") else "loss"


@dataclass(frozen=True)
class Comparison:
    """A metric of the first side minus that of the second, per token."""

    difference: float
    low: float | None
    """Lower end of the 95 % confidence interval; None: too few rows for one."""
    high: float | None
    """Upper end of the 95 % confidence interval."""
    confidence: float | None
    """One-sided confidence that the first side is better, in [0, 1]."""
    verdict: str
    """`better`, `worse`, `no clear difference`, or `too few rows to say`."""


def compare_adapters(
    first: "Evaluation",
    second: "Evaluation",
    metric: Metric = "loss",
    max_resamples: int = MAX_RESAMPLES,
) -> Comparison:
    """Compare two adapters: what other rows of the same kind would show.

    Args:
        first: the evaluation of the first adapter.
        second: that of the second, on the same rows.
        metric: what is compared.
        max_resamples: resamples of the rows, where memory allows so many.
    """
    differences = _row_sums(first, metric) - _row_sums(second, metric)
    tokens = _row_tokens(first)
    mean = row_mean(differences, tokens)
    if not mean.is_measurable:
        return _too_few_rows(mean.value)
    low, high = row_interval(differences, tokens, max_resamples)
    freedom = mean.effective_rows - 1
    confidence = _confidence(mean.value, mean.standard_error, freedom, metric)
    return _comparison(mean.value, low, high, confidence, metric)


def compare_configs(
    winner: "Evaluation",
    baseline: Sequence["Evaluation"],
    candidates: int,
    metric: Metric = "loss",
    max_resamples: int = MAX_RESAMPLES,
) -> Comparison:
    """Compare the winner's config with the baseline's, which was trained with several seeds.

    The winner was chosen among others, so part of its lead is the luck of its seed. The end of the
    interval that says `better` allows for as much as the best of equal configs has by luck. The
    errors by seeds and by rows are combined by the method of variance estimates recovery (Zou and
    Donner, 2008).

    Args:
        winner: the evaluation of the winner's adapter, of one seed.
        baseline: evaluations of the baseline with at least two seeds, on the same rows.
        candidates: number of trials among which the winner was chosen.
        metric: what is compared.
        max_resamples: resamples of the rows, where memory allows so many.
    """
    tokens = _row_tokens(winner)
    sums = np.array([_row_sums(evaluation, metric) for evaluation in baseline])
    differences = _row_sums(winner, metric) - sums.mean(0)
    mean = row_mean(differences, tokens)
    if not mean.is_measurable:
        return _too_few_rows(mean.value)
    row_low, row_high = row_interval(differences, tokens, max_resamples)
    seeds = seed_mean(sums.sum(1) / tokens.sum())
    seed_error = math.sqrt(seeds.variance + seeds.mean_variance)
    plain = float(stats.t.ppf(UPPER_QUANTILE, seeds.seeds - 1))
    selected = selected_quantile(max(candidates, 1), seeds.seeds)
    # The winner's luck makes it look better: smaller by a loss, larger by an accuracy.
    below, above = (selected, plain) if metric == "accuracy" else (plain, selected)
    low = mean.value - math.hypot(mean.value - row_low, below * seed_error)
    high = mean.value + math.hypot(row_high - mean.value, above * seed_error)
    return _comparison(mean.value, low, high, None, metric)


def compare_seeds(
    first: Sequence["Evaluation"],
    second: Sequence["Evaluation"],
    metric: Metric = "loss",
) -> Comparison:
    """Compare two configs that were both trained with the same seeds.

    Args:
        first: one evaluation for each seed, on the same rows.
        second: evaluations on the same rows and with the same seeds, in the same order.
        metric: what is compared.
    """
    if len(first) == 1:
        return compare_adapters(first[0], second[0], metric)
    tokens = _row_tokens(first[0])
    # [seeds, rows].
    differences = np.array(
        [
            _row_sums(one, metric) - _row_sums(other, metric)
            for one, other in zip(first, second, strict=True)
        ]
    )
    mean = row_mean(differences.mean(0), tokens)
    if not mean.is_measurable:
        return _too_few_rows(mean.value)
    seeds = seed_mean(differences.sum(1) / tokens.sum())
    error, freedom = combined_error(mean, seeds)
    half_width = combined_half_width(mean, seeds)
    confidence = _confidence(mean.value, error, freedom, metric)
    low, high = mean.value - half_width, mean.value + half_width
    return _comparison(mean.value, low, high, confidence, metric)


def _row_sums(evaluation: "Evaluation", metric: Metric) -> np.ndarray:
    """Return the metric of each row, summed over its tokens `[rows]`."""
    rows = evaluation.row_losses if metric == "loss" else evaluation.row_correct
    return np.array(rows, dtype=float)


def _row_tokens(evaluation: "Evaluation") -> np.ndarray:
    return np.array(evaluation.row_tokens, dtype=float)


def _confidence(
    difference: float, error: float, freedom: float, metric: Metric
) -> float:
    """Return the one-sided confidence that the first side is better."""
    gain = difference if metric == "accuracy" else -difference
    if error == 0:
        return float((1 + np.sign(gain)) / 2)
    return float(stats.t.cdf(gain / error, freedom))


def _comparison(
    difference: float,
    low: float,
    high: float,
    confidence: float | None,
    metric: Metric,
) -> Comparison:
    is_above, is_below = (
        ("better", "worse") if metric == "accuracy" else ("worse", "better")
    )
    verdict = "no clear difference"
    if high < 0:
        verdict = is_below
    elif low > 0:
        verdict = is_above
    return Comparison(difference, low, high, confidence, verdict)


def _too_few_rows(difference: float) -> Comparison:
    return Comparison(difference, None, None, None, "too few rows to say")
