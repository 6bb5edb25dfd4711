"""Advice on how to continue a study, from its own trials: each line names the number behind it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import binomtest

from sweeps.answer.importance import (
    MeasuredTrial,
    Share,
    comparable_trials,
    importances,
)
from sweeps.answer.improvement import expected_improvement
from sweeps.answer.ranges import (
    End,
    bounds,
    is_ordered,
    newest_distributions,
    position,
    value_beyond,
)
from sweeps.study.formatting import format_value
from sweeps.study.study import Study, role

MIN_TRIALS = 8
"""Measured trials that are needed before any advice."""


AT_COMMON_RUNG = "at the last rung that all trials reached"
"""Where trials are compared if some were pruned. It may be an early rung, so the advice says so."""


MIN_BEST = 4
MAX_BEST = 10
"""The best quarter of the trials is looked at for bounds, within these numbers of trials."""


EDGE = 0.15
"""Share of a range, at each end, in which a trial counts as close to the bound."""


SIGNIFICANCE = 0.01
"""Largest probability that so many of the best trials are close to a bound by chance alone."""


NEGLIGIBLE_SHARE = 0.1
"""A parameter has little influence if 19 of 20 resamples give it a share below this."""


WORTHWHILE_GAIN = 0.1
"""More trials are worthwhile if the expected gain exceeds this share of the trials' spread."""


@dataclass(frozen=True)
class Analysis:
    """What the trials of a study show."""

    importance: Mapping[str, Share]
    """Share of each parameter, the largest first."""
    advice: list[str]


def analyze(study: Study) -> Analysis:
    """Compute the importance of each parameter, and the advice that follows."""
    importance = importances(study.optuna)
    return Analysis(importance, advise(study, importance))


def advise(study: Study, importance: Mapping[str, Share]) -> list[str]:
    """Give advice on bounds, on parameters to fix, and on more trials.

    Returns:
        One line for each piece of advice; none with several objectives, or with too few trials.
    """
    if len(study.objectives) > 1:
        return []
    ranked = _rank(study, comparable_trials(study.optuna))
    if len(ranked) < MIN_TRIALS:
        return []
    trials = [trial for trial, _ in ranked]
    bound_lines = _bound_lines(trials)
    fixable_lines = _fixable_lines(trials[0], importance)
    lines = [*bound_lines, *fixable_lines]
    if any(trial.state == TrialState.PRUNED for trial in trials):
        lines = [f"{line} (measured {AT_COMMON_RUNG})" for line in lines]
    return [*lines, *_more_trials_lines(study, ranked)]


def _rank(study: Study, measured: Iterable[MeasuredTrial]) -> list[MeasuredTrial]:
    """Replace values by costs (less is better) and sort, the best first."""
    costs = [(trial, study.to_cost(value)) for trial, value in measured]
    return sorted(costs, key=lambda pair: pair[1])


def _bound_lines(ranked: Sequence[FrozenTrial]) -> list[str]:
    """Name the parameters whose best values are close to a bound, and a value beyond it."""
    best_count = max(MIN_BEST, len(ranked) // 4)
    best = ranked[: min(best_count, MAX_BEST)]
    lines = []
    for name, distribution in newest_distributions(ranked).items():
        crowded = _crowded_end(distribution, best, name)
        if crowded is None:
            continue
        count, end = crowded
        extension = value_beyond(distribution, end)
        if extension is not None:
            low, high = bounds(distribution)
            interval = f"{format_value(low)} … {format_value(high)}"
            lines.append(
                f"{name}: {count} of the best {len(best)} trials are at the {end} end of "
                f"{interval}; extend it to {format_value(extension)}"
            )
    return lines


def _crowded_end(
    distribution: BaseDistribution, best: Sequence[FrozenTrial], name: str
) -> tuple[int, End] | None:
    """Find the end of a range that more of the best trials are close to than chance explains.

    Returns:
        The number of trials close to that end, and the end; None if there is none.
    """
    edge = _edge_width(distribution)
    if edge is None:
        return None
    positions = []
    for trial in best:
        if name not in trial.params:
            return None
        relative_position = position(distribution, trial.params[name])
        if relative_position is None:
            return None
        positions.append(relative_position)
    lower_count = sum(at <= edge for at in positions)
    upper_count = sum(at >= 1 - edge for at in positions)
    end: End = "lower" if lower_count > upper_count else "upper"
    count = max(lower_count, upper_count)
    # If values had nothing to do with the result, each would be in the edge with this probability.
    probability = binomtest(
        count,
        len(best),
        edge,
        "greater",
    ).pvalue
    if probability >= SIGNIFICANCE:
        return None
    return count, end


def _edge_width(distribution: BaseDistribution) -> float | None:
    """Return the share of a range that counts as an edge; None if it has no ends."""
    if not isinstance(distribution, CategoricalDistribution):
        return EDGE
    # Of two choices, each is at an end.
    if is_ordered(distribution) and len(distribution.choices) > 2:
        return 1 / len(distribution.choices)
    return None


def _fixable_lines(best: FrozenTrial, importance: Mapping[str, Share]) -> list[str]:
    """Name the parameters with little influence, and the best trial's values to fix them at."""
    shares = []
    overrides = []
    for name, share in importance.items():
        # By the upper end: a small share that may well be large is no reason to fix anything.
        if share.high < NEGLIGIBLE_SHARE and name in best.params:
            value = format_value(best.params[name])
            shares.append(f"{name} ({share.share:.0%}, at most {share.high:.0%})")
            overrides.append(f"{name}={value}")
    if not shares:
        return []
    return [
        f"little influence: {', '.join(shares)}; "
        f"fix with {' '.join(overrides)} and search fewer dimensions"
    ]


def _more_trials_lines(study: Study, ranked: Sequence[MeasuredTrial]) -> list[str]:
    """Say what the next trial is expected to gain; nothing for a grid, whose points are fixed.

    The final values of complete trials are used if there are enough of them.
    """
    if any(role(trial) == "grid" for trial in study.trials()):
        return []
    objective = study.objectives[0]
    trials = [trial for trial, _ in ranked]
    complete = _rank(study, _final_values(trials))
    if len(complete) >= MIN_TRIALS:
        improvement = expected_improvement(complete)
    else:
        improvement = expected_improvement(ranked)
        objective = f"{objective} {AT_COMMON_RUNG}"
    if improvement is None:
        return []
    relative_gain = f"{improvement.relative:.0%} of the spread between trials"
    gain = f"{improvement.gain:.2g} ({relative_gain})"
    if improvement.gain > WORTHWHILE_GAIN * improvement.spread:
        conclusion = f"continue with hydra.sweeper.n_trials={_larger_total(study)}"
    else:
        conclusion = "more trials are unlikely to help"
    return [f"expected gain of the next trial in {objective}: {gain}; {conclusion}"]


def _final_values(trials: Iterable[FrozenTrial]) -> list[MeasuredTrial]:
    """Pair complete trials with their finite final values."""
    measured = []
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            value = trial.value or 0.0
            if math.isfinite(value):
                measured.append((trial, value))
    return measured


def _larger_total(study: Study) -> int:
    """Return the trial count to continue with: twice as many, or all that already wait."""
    total = len(study.trials())
    if study.trials(TrialState.WAITING):
        return total
    return 2 * total
