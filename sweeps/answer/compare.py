"""Compare two adapters, or the configs behind them, by a metric on the same rows.

Two adapters differ on these rows by what other rows could show otherwise. Two configs differ by
that, and by the seeds with which they were trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from finetune.metrics.metric import Score
from finetune.metrics.row_interval import (
    MAX_RESAMPLES,
    UPPER_QUANTILE,
    row_interval,
    row_mean,
)
from sweeps.answer.intervals import (
    combined_error,
    combined_half_width,
    seed_mean,
    selected_quantile,
)

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


def metric_of(objective: str) -> str:
    """Return the metric by which an objective is compared on the test rows.

    Args:
        objective: the name of the study's objective, for example `eval/exact_match`.
    """
    split, _, name = objective.partition("/")
    # What is no metric of rows (train/seconds) is compared by the loss.
    return name if split == "eval" else "loss"


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
    """`better`, `worse`, `no clear difference`, `too few rows to say`, or `one number for all
    rows`: without scores of rows there is no interval."""


def compare_adapters(
    first: "Evaluation",
    second: "Evaluation",
    metric: str = "loss",
    max_resamples: int = MAX_RESAMPLES,
) -> Comparison:
    """Compare two adapters: what other rows of the same kind would show.

    Args:
        first: the evaluation of the first adapter.
        second: that of the second, on the same rows.
        metric: what is compared.
        max_resamples: resamples of the rows, where memory allows so many.
    """
    rows = _rows_of([first, second], metric)
    if rows.tokens is None:
        return _without_rows(rows.values[0] - rows.values[1], "one number for all rows")
    tokens = rows.tokens
    differences = rows.sums[0] - rows.sums[1]
    mean = row_mean(differences, tokens)
    if not mean.is_measurable:
        return _without_rows(mean.value, "too few rows to say")
    low, high = row_interval(differences, tokens, max_resamples)
    is_loss = metric.rpartition("/")[2] == "loss"
    # Losses that are all equal are of one model; right and wrong answers need not be.
    if not is_loss and rows.are_shares and not differences.any():
        high = _largest_unseen_difference(mean.effective_rows)
        low = -high
    freedom = mean.effective_rows - 1
    rising = rows.higher_is_better
    confidence = _confidence(mean.value, mean.standard_error, freedom, rising)
    return _comparison(mean.value, low, high, confidence, rising)


def compare_configs(
    winner: "Evaluation",
    baseline: Sequence["Evaluation"],
    candidates: int,
    metric: str = "loss",
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
    rows = _rows_of([winner, *baseline], metric)
    if rows.tokens is None:
        difference = rows.values[0] - float(np.mean(rows.values[1:]))
        return _without_rows(difference, "one number for all rows")
    tokens, sums = rows.tokens, rows.sums[1:]
    differences = rows.sums[0] - sums.mean(0)
    mean = row_mean(differences, tokens)
    if not mean.is_measurable:
        return _without_rows(mean.value, "too few rows to say")
    row_low, row_high = row_interval(differences, tokens, max_resamples)
    seeds = seed_mean(sums.sum(1) / tokens.sum())
    seed_error = math.sqrt(seeds.variance + seeds.mean_variance)
    plain = float(stats.t.ppf(UPPER_QUANTILE, seeds.seeds - 1))
    selected = selected_quantile(max(candidates, 1), seeds.seeds)
    # The winner's luck makes it look better: smaller by a loss, larger by an accuracy.
    rising = rows.higher_is_better
    below, above = (selected, plain) if rising else (plain, selected)
    low = mean.value - math.hypot(mean.value - row_low, below * seed_error)
    high = mean.value + math.hypot(row_high - mean.value, above * seed_error)
    return _comparison(mean.value, low, high, None, rising)


def compare_seeds(
    first: Sequence["Evaluation"],
    second: Sequence["Evaluation"],
    metric: str = "loss",
) -> Comparison:
    """Compare two configs that were both trained with the same seeds.

    Args:
        first: one evaluation for each seed, on the same rows.
        second: evaluations on the same rows and with the same seeds, in the same order.
        metric: what is compared.
    """
    if len(first) == 1:
        return compare_adapters(first[0], second[0], metric)
    rows = _rows_of([*first, *second], metric)
    seed_count = len(first)
    if rows.tokens is None:
        values = np.array(rows.values)
        difference = float(np.mean(values[:seed_count] - values[seed_count:]))
        return _without_rows(difference, "one number for all rows")
    tokens = rows.tokens
    # [seeds, rows].
    differences = rows.sums[:seed_count] - rows.sums[seed_count:]
    mean = row_mean(differences.mean(0), tokens)
    if not mean.is_measurable:
        return _without_rows(mean.value, "too few rows to say")
    seeds = seed_mean(differences.sum(1) / tokens.sum())
    error, freedom = combined_error(mean, seeds)
    half_width = combined_half_width(mean, seeds)
    rising = rows.higher_is_better
    confidence = _confidence(mean.value, error, freedom, rising)
    low, high = mean.value - half_width, mean.value + half_width
    return _comparison(mean.value, low, high, confidence, rising)


@dataclass(frozen=True)
class _Rows:
    """A metric of several evaluations on the rows that all of them have scored."""

    values: list[float]
    """The metric of each evaluation, on all of its rows."""
    higher_is_better: bool
    sums: np.ndarray
    """Summed over each row's tokens or answers `[evaluations, rows]`."""
    tokens: np.ndarray | None
    """Tokens or answers of each row `[rows]`; None for one number of all rows."""

    @property
    def are_shares(self) -> bool:
        """Whether each row's mean is a share, in [0, 1]."""
        is_share = (self.sums >= 0) & (self.sums <= self.tokens)
        return bool(is_share.all())


def _largest_unseen_difference(rows: float) -> float:
    """Return the difference that rows of another sample may have where no row of this one differs.

    If a larger share of all rows differed, some of these would, but in 2.5 of 100 samples. Their
    differences are at most 1.
    """
    return float(1 - (1 - UPPER_QUANTILE) ** (1 / rows))


def _rows_of(evaluations: Sequence["Evaluation"], metric: str) -> _Rows:
    scores: list[Score] = []
    for evaluation in evaluations:
        score = evaluation.score(metric)
        assert score is not None, metric
        scores.append(score)
    values = [score.value for score in scores]
    rising = scores[0].higher_is_better
    sums = np.array([score.row_sums for score in scores], dtype=float)
    counts = np.array([score.row_counts for score in scores], dtype=float)
    if not counts.size:
        return _Rows(values, rising, sums, None)
    if (counts == counts[0]).all():
        return _Rows(values, rising, sums, counts[0])
    # Where a judge has failed for one of them, a row counts as often as all have scored it.
    common = counts.min(0)
    sums = sums / np.maximum(counts, 1) * common
    scored = common > 0
    return _Rows(values, rising, sums[:, scored], common[scored])


def _confidence(
    difference: float, error: float, freedom: float, higher_is_better: bool
) -> float:
    """Return the one-sided confidence that the first side is better."""
    gain = difference if higher_is_better else -difference
    if error == 0:
        return float((1 + np.sign(gain)) / 2)
    return float(stats.t.cdf(gain / error, freedom))


def _comparison(
    difference: float,
    low: float,
    high: float,
    confidence: float | None,
    higher_is_better: bool,
) -> Comparison:
    is_above, is_below = (
        ("better", "worse") if higher_is_better else ("worse", "better")
    )
    verdict = "no clear difference"
    if high < 0:
        verdict = is_below
    elif low > 0:
        verdict = is_above
    return Comparison(difference, low, high, confidence, verdict)


def _without_rows(difference: float, verdict: str) -> Comparison:
    return Comparison(difference, None, None, None, verdict)
